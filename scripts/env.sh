# shellcheck shell=bash
# Sourced by the other scripts: where the repository is, where cargo is, how to speak and to be root.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1

# rustup puts cargo here; a login shell from before its installation doesn't know it yet. First, so
# that a distribution's old cargo doesn't hide it.
case ":$PATH:" in
*":${CARGO_HOME:-$HOME/.cargo}/bin:"*) ;;
*) PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH" ;;
esac
# sshd, mkfs.ext4 and cryptsetup lie here; Debian leaves it out of an ordinary user's PATH.
case ":$PATH:" in
*:/usr/sbin:*) ;;
*) PATH="$PATH:/usr/sbin:/sbin" ;;
esac
export PATH

# Where builds go: the caller's choice, or ./target.
# shellcheck disable=SC2034 # read by the scripts that source this
TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}

say() { printf '==> %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root: directly, or through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "must be root for: $* (run this as root, or install sudo)"
    fi
}

rust_version_needed() { sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml; }

# Whether the cargo that would run is new enough for this workspace.
cargo_is_new_enough() {
    local have need
    need=$(rust_version_needed)
    have=$(cargo --version 2>/dev/null | awk '{print $2}') || return 1
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$need" "$have" | sort -V | head -n1)" = "$need" ]
}

# An old default toolchain stays the user's default; ours is chosen for these scripts only.
if ! cargo_is_new_enough && command -v rustup >/dev/null && rustup run stable cargo --version >/dev/null 2>&1; then
    export RUSTUP_TOOLCHAIN=stable
fi
