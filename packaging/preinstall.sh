#!/bin/sh
# An upgrade compares the unit with the one before.
set -e
unit=/usr/lib/systemd/system/mic.service
rm -f /run/mic.service.before
if [ -e "$unit" ]; then
    cp -p "$unit" /run/mic.service.before
fi
