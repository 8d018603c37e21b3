#!/bin/sh
# Usage: system_packages.sh PACKAGE...
# Installs the missing ones of these Debian packages when it runs as root with apt; otherwise prints the one command
# to run and exits with 1.
set -eu

missing=""
for package in "$@"; do
  state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

install="apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing:$missing"
  export DEBIAN_FRONTEND=noninteractive
  # shellcheck disable=SC2086 # the command is words on purpose
  if apt-get update -qq </dev/null && $install -qq </dev/null >/dev/null; then exit 0; fi
  echo "That failed. Mend it and run: $install"
else
  echo "Missing:$missing"
  if command -v apt-get >/dev/null; then echo "Run: sudo $install"; else
    echo "On Debian or Ubuntu: $install. Elsewhere install the same fonts, CLDR annotations and cairo by hand."
  fi
fi
exit 1
