#!/bin/sh
# Packages do not start their services when they are installed.
exit 101
