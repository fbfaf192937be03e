#!/bin/sh -e
buildbot start --nodaemon master &
buildbot-worker start --nodaemon worker &
wait
