#!/bin/sh
# deb: remove, or upgrade; rpm: how many versions remain.
set -e
case "$1" in remove | 0) ;; *) exit 0 ;; esac
echo "mic-supervisor: removing the package stops no model."
mic-supervisor uninstall --prefix /usr --dry-run 2>&1 | grep -v '^Nothing below' || true
if [ -d /run/systemd/system ]; then
    systemctl --no-reload disable --now mic.service || true
fi
find /usr/lib/mic-supervisor -name __pycache__ -prune -exec rm -rf {} +
