#!/usr/bin/env bash
# Install on this machine (Debian 12 or 13, as root) what sandboxd needs to be built, tested and run; then run just recipes:
#
#     ./bootstrap.sh            install only
#     ./bootstrap.sh demo       install, then `just demo`
#     ./bootstrap.sh test       also install packages for the tests, then `just test`
#
# Idempotent: installed packages are not changed. apt, pip and uv honour their usual environment variables and configuration
# files; the mirror for backports is that of this machine's apt.
set -euo pipefail
cd "$(dirname "$0")"

UV_VERSION=0.13.9
JUST_VERSION=1.59.0
TOOLS="$PWD/.tools"
VSOCK_TOOLS="${SANDBOXD_PATHS__TOOLS_DIR:-/var/lib/sandboxd/tools}"

say() { printf 'bootstrap: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

check_machine() {
    [ "$(id -u)" = 0 ] || fail "must run as root (it installs packages, and sandboxd makes network namespaces): sudo ./bootstrap.sh $*"
    [ -r /etc/os-release ] || fail "this is not Debian: /etc/os-release is missing"
    # shellcheck source=/dev/null
    . /etc/os-release
    [ "${ID:-}" = debian ] || fail "needs Debian 12 or 13; this is ${PRETTY_NAME:-unknown}"
    case "${VERSION_CODENAME:-}" in
        bookworm | trixie) ;;
        *) fail "needs Debian 12 (bookworm) or 13 (trixie); this is ${PRETTY_NAME:-unknown}" ;;
    esac
}

# Print those of the given packages that are not installed.
missing() {
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || printf '%s\n' "$name"
    done
}

qemu_is_recent() {
    local version
    version=$(dpkg-query -W -f '${db:Status-Status} ${Version}' qemu-system-x86 2>/dev/null) || return 1
    [ "${version%% *}" = installed ] && dpkg --compare-versions "${version#* }" ge 1:10
}

update_lists() {
    say "refreshing package lists"
    apt-get -q=2 update || fail "apt-get update failed: is the network up, and are apt's sources right?"
}

install_debs() {
    DEBIAN_FRONTEND=noninteractive apt-get -q=2 -y -o Dpkg::Use-Pty=0 install --no-install-recommends "$@" >/dev/null ||
        fail "apt-get could not install: $*"
}

# Print the mirror of this machine's release.
own_mirror() {
    apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk -v release="$VERSION_CODENAME" '$1 == release && !seen++ { print $2 }'
}

# Debian 12 has QEMU 7.2; its backports have the releases with which sandboxd is tested.
ensure_backports() {
    [ "$VERSION_CODENAME" = bookworm ] || return 0
    if apt-get indextargets --format '$(RELEASE)' | grep -x bookworm-backports >/dev/null; then return 0; fi
    local mirror
    mirror=$(own_mirror)
    [ -n "$mirror" ] || fail "apt has no source for bookworm, so the mirror for bookworm-backports is unknown"
    say "adding bookworm-backports from the mirror in use"
    cat > /etc/apt/sources.list.d/sandboxd-backports.sources <<SOURCES
Types: deb
URIs: $mirror
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
}

install_packages() {
    local wanted absent
    wanted=(ca-certificates debian-archive-keyring python3 python3-venv iproute2 e2fsprogs erofs-utils libnftables1 mmdebstrap
        openssl xz-utils zstd)
    # For the tests: the reference implementation of yamux (Go), git, nft to list rules, SSH clients, and systemd-nspawn.
    if [ "${1:-}" = test ]; then wanted+=(golang-go golang-github-hashicorp-yamux-dev git nftables openssh-client systemd-container); fi
    mapfile -t absent < <(missing "${wanted[@]}")
    if [ ${#absent[@]} -eq 0 ] && qemu_is_recent; then return 0; fi
    if ! qemu_is_recent; then ensure_backports; fi
    update_lists
    if [ ${#absent[@]} -gt 0 ]; then
        say "installing ${absent[*]}"
        install_debs "${absent[@]}"
    fi
    if ! qemu_is_recent; then
        say "installing QEMU"
        if [ "$VERSION_CODENAME" = bookworm ]; then
            install_debs -t bookworm-backports qemu-system-x86
        else
            install_debs qemu-system-x86
        fi
    fi
}

# The AF_VSOCK backend for hosts without /dev/vhost-vsock is only in Debian unstable, but its binary runs on stable releases. It is
# downloaded with apt (which checks signatures) through separate package lists, and unpacked instead of installed.
install_vsock_backend() {
    [ ! -x "$VSOCK_TOOLS/vhost-device-vsock" ] || return 0
    local mirror work options
    mirror=$(own_mirror)
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/unpacked" "$VSOCK_TOOLS"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s unstable main\n' "$mirror" > "$work/sources.list"
    options=(-q=2 -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
    say "downloading vhost-device-vsock"
    if [ -n "$mirror" ] && apt-get "${options[@]}" update && (cd "$work" && apt-get "${options[@]}" download vhost-device-vsock) &&
        dpkg-deb -x "$work"/vhost-device-vsock_*.deb "$work/unpacked"; then
        install -m 755 "$work/unpacked/usr/bin/vhost-device-vsock" "$VSOCK_TOOLS/"
    else
        say "vhost-device-vsock cannot be downloaded; the vsock link (not the default) and its tests need it or /dev/vhost-vsock"
    fi
    rm -rf "$work"
}

install_tools() {
    local stamp="$TOOLS/.uv-$UV_VERSION-just-$JUST_VERSION"
    if [ ! -e "$stamp" ]; then
        say "installing uv and just"
        rm -rf "$TOOLS"
        /usr/bin/python3 -m venv "$TOOLS"
        "$TOOLS/bin/python" -m pip -q install --disable-pip-version-check "uv==$UV_VERSION" "rust-just==$JUST_VERSION" ||
            fail "pip could not install uv and just: is the network up, and pip's index configured?"
        touch "$stamp"
    fi
    export PATH="$TOOLS/bin:$PATH"
    # Makes uv trust the certificates of this system, as apt and pip do.
    export UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1
}

check_machine "$@"
install_packages "$@"
install_vsock_backend
install_tools
if [ $# -gt 0 ]; then exec just "$@"; fi
say "ready; recipes: $TOOLS/bin/just --list"
