#!/bin/sh
# Runs a step of a Dockerfile: the OCI runtime as the image builder calls it. The sandbox's control group holds all steps, so they have none
# of their own. Every image has a /tmp, also one that begins from scratch.
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
exec crun --cgroup-manager=disabled "$@"
