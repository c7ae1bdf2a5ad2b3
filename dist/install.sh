#!/bin/sh
# Installs the files beside it below PREFIX (default: /usr/local), or removes them again.
# usage: [PREFIX=/usr/local] [DESTDIR=] ./install.sh [--uninstall]
# Keys, config and state in /etc/sprat and /var/lib/sprat are never removed.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
prefix=${PREFIX:-/usr/local}
root=${DESTDIR:-}

case ${1:-} in
'' | --uninstall) ;;
*)
    echo "usage: [PREFIX=/usr/local] [DESTDIR=] $0 [--uninstall]" >&2
    exit 2
    ;;
esac
case $prefix in
/*) ;;
*)
    echo "install.sh: PREFIX must be an absolute path: $prefix" >&2
    exit 2
    ;;
esac

# Only for this machine, not while a package is made.
reload() {
    if [ -z "$root" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
}

if [ "${1:-}" = --uninstall ]; then
    if [ -z "$root" ] && [ -x "$prefix/bin/sprat" ]; then
        "$prefix/bin/sprat" schedule remove
    fi
    (cd "$here" && find bin lib share -type f -o -type l) | while IFS= read -r file; do
        rm -f "$root$prefix/$file"
    done
    # Only folders that are sprat's own.
    for folder in share/sprat/exclude share/sprat share/doc/sprat/examples share/doc/sprat; do
        rmdir "$root$prefix/$folder" 2>/dev/null || true
    done
    reload
    echo "removed sprat from $root$prefix; /etc/sprat and /var/lib/sprat are as they were"
    exit
fi

(cd "$here" && find bin lib share -type d) | while IFS= read -r folder; do
    [ -d "$root$prefix/$folder" ] || install -d -m 755 "$root$prefix/$folder"
done
(cd "$here" && find bin lib share -type f) | while IFS= read -r file; do
    mode=644
    case $file in bin/*) mode=755 ;; esac
    install -m "$mode" "$here/$file" "$root$prefix/$file"
    case $file in
    # The units name the program by its full path.
    lib/systemd/*) sed -i "s|/usr/bin/sprat|$prefix/bin/sprat|" "$root$prefix/$file" ;;
    esac
done
# It holds keys.
[ -d "$root/etc/sprat" ] || install -d -m 700 "$root/etc/sprat"
reload
[ -n "$root" ] || echo "installed sprat in $prefix. Next: sprat setup"
