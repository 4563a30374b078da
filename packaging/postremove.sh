#!/bin/sh
# deb alone has purge. The state goes with it, unless models that are running may use it.
set -e
[ "$1" = purge ] || exit 0
running=
if [ -d /run/systemd/system ]; then
    running=$(systemctl list-units --plain --no-legend --state=running 'mic-*.service')
fi
if command -v docker >/dev/null; then
    running=$running$(docker ps --quiet --filter label=io.mic.scope) || running=unknown
fi
if [ -n "$running" ]; then
    echo "mic-supervisor: /var/lib/mic stays, since models may be running that use it."
else
    rm -rf /var/lib/mic /run/mic
fi
if [ -e /etc/mic/gpus.yaml ]; then
    echo "mic-supervisor: /etc/mic/gpus.yaml is yours, and stays."
fi
