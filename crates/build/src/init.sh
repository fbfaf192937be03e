# First process of a build's sandbox: init.sh DAEMON_CONFIGURATION. Says "ready" and waits for a line, which means that the network is
# connected; starts the image builder's daemon and says "up". Ends when its input ends: the server has finished, or is gone.
set -u
echo ready
read -r _ || exit 0
echo 1 >/proc/sys/net/ipv4/ip_forward
# Steps are on a bridge of their own; what they send leaves with the sandbox's address.
nft 'table ip builder { chain postrouting { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }; }'

dockerd --config-file "$1" >/run/dockerd.log 2>&1 &
daemon=$!
# The daemon opens its socket at once and answers when it has started.
until docker version >/run/version 2>&1; do
    if ! kill -0 "$daemon" 2>/dev/null; then
        tail -n 20 /run/dockerd.log >&2
        exit 1
    fi
    sleep 0.05
done
echo up
read -r _ || true
kill -TERM "$daemon"
# Nobody else would end it if the server is gone.
(sleep 15; kill -KILL "$daemon") &
wait "$daemon"
