# Starts the image builder's daemon and waits until it answers; its process is then $daemon. Read by the script that prepared the sandbox.
echo 1 >/proc/sys/net/ipv4/ip_forward
# Steps are on a bridge of their own; what they send leaves with the sandbox's address.
nft 'table ip builder { chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }; }'

# Builds make layers only. What else is in the store was put there by somebody who had broken out of a step, for the next build to start.
rm -rf /var/lib/docker/containers /var/lib/docker/plugins /var/lib/docker/swarm /var/lib/docker/network
dockerd --config-file /build/daemon.json "$@" >/run/dockerd.log 2>&1 </dev/null &
daemon=$!
# The daemon opens its socket at once and answers when it has started.
until docker version >/run/version 2>&1; do
    if ! kill -0 "$daemon" 2>/dev/null; then
        tail -n 20 /run/dockerd.log >&2
        exit 1
    fi
    sleep 0.05
done
