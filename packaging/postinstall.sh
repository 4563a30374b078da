#!/bin/sh
# deb: configure [OLD VERSION]; rpm: how many versions there are now.
set -e
case "$1" in configure | 1 | 2) ;; *) exit 0 ;; esac
home=/usr/lib/mic-supervisor
unit=/usr/lib/systemd/system/mic.service
before=/run/mic.service.before

# The daemon may not write there, and would compile itself with each start.
find "$home" -name __pycache__ -prune -exec rm -rf {} +
"$home/bin/python3" -m compileall -q -j 0 "$home/lib" || true
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers mic.conf
fi
if [ ! -e "$before" ]; then
    echo "mic-supervisor: what this machine lacks, and what comes next:"
    timeout 30 mic-supervisor doctor | grep -v '^ok ' || true
    exit 0
fi

if cmp -s "$before" "$unit"; then
    touch -r "$before" "$unit" # to systemd it is the file that it knows
    changed=no
else
    changed=yes
fi
rm -f "$before"
[ -d /run/systemd/system ] || exit 0
if [ "$changed" = yes ]; then
    # On some hosts this takes the GPUs away from containers that run.
    if timeout 30 mic-supervisor doctor | grep -q '^warn  docker cgroups'; then
        echo "mic-supervisor: mic.service changed, and systemd does not know it yet: a daemon-reload"
        echo "would take the GPUs from containers that run. \`mic-supervisor doctor\` says how to fix"
        echo "that. Then: systemctl daemon-reload, systemctl restart mic"
    else
        systemctl daemon-reload
    fi
fi
# What runs is adopted by the new daemon. Where none runs, none is started.
systemctl try-restart mic.service || true
