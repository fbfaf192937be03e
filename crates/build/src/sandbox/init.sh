# First process of a build's container. Says "ready" and waits for a line, which means that the network is connected; starts the image
# builder's daemon and says "up". Ends when its input ends: the server has finished, or is gone.
set -u
echo ready
read -r _ || exit 0
set --
. /build/daemon.sh
echo up
read -r _ || true
kill -TERM "$daemon"
# Nobody else would end it if the server is gone.
(sleep 15; kill -KILL "$daemon") &
wait "$daemon"
