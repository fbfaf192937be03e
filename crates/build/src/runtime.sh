#!/bin/sh
# Runs a step of a Dockerfile: the OCI runtime as the image builder calls it. Every image has a /tmp, also one that begins from scratch.
previous=
for argument; do
    if [ "$previous" = --bundle ]; then
        root=$(sed -n 's/.*"root":{"path":"\([^"]*\)".*/\1/p' "$argument/config.json")
        if [ -n "$root" ] && [ ! -e "$root/tmp" ] && [ ! -L "$root/tmp" ]; then
            mkdir -m 1777 "$root/tmp"
            chmod 1777 "$root/tmp"
        fi
    fi
    previous=$argument
done
# In a container, its control group holds all steps, and devices are closed to its root. In a machine, each step's own group closes them.
manager=disabled
[ ! -b /dev/store ] || manager=cgroupfs
exec crun --cgroup-manager="$manager" "$@"
