#!/bin/sh
# Makes .venv with Fathom installed in it as an editable package. Does nothing where that is done already.
#
#   scripts/setup.sh         what a user needs: Fathom with its extras serve, eval and gguf
#   scripts/setup.sh test    what the checks and tests need too
#
# From the environment:
#   PYTHON         the Python to use, 3.11 or newer (default: python3.11 where there is one, else python3)
#   TORCH_VERSION  replaces the torch pinned in constraints.txt
#   TORCH_INDEX    one more index to find torch in, e.g. https://download.pytorch.org/whl/cpu

set -eu
cd "$(dirname "$0")/.."
extra=${1:-}
free_gb_needed=3

say() {
    printf 'set-up: %s\n' "$*" >&2
}

fail() {
    say "$@"
    exit 1
}

# "3.11" for a working Python, nothing for anything else. (A version manager may offer commands that do not run.)
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

choose_python() {
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=python3
        if [ -n "$(version_of python3.11)" ]; then python=python3.11; fi
    fi
    version=$(version_of "$python")
    [ -n "$version" ] || fail "'$python' does not run. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3"
    major=${version%%.*}
    minor=${version#*.}
    if [ "$major" -lt 3 ] || { [ "$major" -eq 3 ] && [ "$minor" -lt 11 ]; }; then
        fail "'$python' is Python $version; Fathom needs 3.11 or newer. Install one, or name it: PYTHON=/path/to/python3"
    fi
}

check_options() {
    case "$extra" in
        '' | test) ;;
        *) fail "unknown argument '$extra': expected 'test' or nothing" ;;
    esac
    case "${TORCH_VERSION:-}" in
        *[!0-9a-z.+]*) fail "TORCH_VERSION is '$TORCH_VERSION'; expected a release such as 2.13.0" ;;
    esac
}

# What decides the environment's contents: while it is the same, there is nothing to do. The folder is part of it,
# since a copied checkout brings a .venv that still points at the original.
fingerprint() {
    echo "$(cat pyproject.toml constraints.txt | cksum) $version ${TORCH_VERSION:-} ${TORCH_INDEX:-} $(pwd)"
}

is_installed() {
    for stamp in "$@"; do
        if [ "$(cat ".venv/$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then return 0; fi
    done
    return 1
}

check_disk() {
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ "$free_kb" -lt $((free_gb_needed * 1024 * 1024)) ]; then
        fail "$((free_kb / 1024)) MB free here; torch and the rest need about $free_gb_needed GB. Free some space and try again."
    fi
}

make_environment() {
    # A .venv of another Python, of another folder, or left half made cannot be repaired: start again.
    if [ "$(version_of .venv/bin/python)" = "$version" ] && grep -qF "$(pwd)/.venv" .venv/bin/activate &&
        .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    check_disk
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "'$python' cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv"
    say "making .venv with Python $version"
    rm -rf .venv
    "$python" -m venv .venv || fail "'$python -m venv .venv' failed; its reason is printed above"
}

install_fathom() {
    rm -f .venv/.installed*
    sed "${TORCH_VERSION:+s/^torch==.*/torch==$TORCH_VERSION/}" constraints.txt >.venv/constraints.txt
    # Progress bars only on a terminal: a log stays short.
    quiet=
    if [ ! -t 1 ]; then quiet=--quiet; fi
    say "installing Fathom and its dependencies into .venv (torch is the large one)"
    # Not compiled to bytecode: that takes longer than all the rest, and most of these modules are never imported.
    # shellcheck disable=SC2086  # an empty $quiet must vanish
    .venv/bin/python -m pip install $quiet --no-compile --disable-pip-version-check -c .venv/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e ".[${extra:-serve,eval,gguf}]" ||
        fail "pip failed; its reason is printed above. No network: check the proxy settings. No torch for this machine:
        try another TORCH_VERSION (2.11.0 to 2.15.0) or TORCH_INDEX. Then run the same command again."
}

# GGUF files are tested against llama.cpp. It comes as source: building takes some minutes, and pip caches the wheel.
install_llama() {
    say "installing llama.cpp for the tests (the first time on this machine it is built: 3 minutes on 2 cores)"
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c .venv/constraints.txt llama-cpp-python ||
        say "llama-cpp-python could not be built (its reason is printed above); tests that need it are skipped.
        Building takes a C++ compiler. Later: .venv/bin/python -m pip install llama-cpp-python"
}

# The GPU's kernels are tested in Triton's interpreter. torch's CUDA builds bring their own Triton, its CPU builds none.
install_triton() {
    if .venv/bin/python -c 'import triton' 2>/dev/null; then return; fi
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check triton==3.7.1 ||
        say "Triton could not be installed (its reason is printed above); the tests of the GPU's kernels are skipped."
}

# The CPU kernels are C++, built when first used. Without a compiler everything still runs, only slower.
warn_without_compiler() {
    for candidate in "${CXX:-c++}" g++ clang++; do
        if command -v "$candidate" >/dev/null 2>&1; then return; fi
    done
    say "no C++ compiler: plain torch replaces the CPU kernels, and training steps take about 1.4 times as long."
    say "On Debian or Ubuntu: apt install g++. On macOS: xcode-select --install"
}

check_options
choose_python
if [ -z "$extra" ] && is_installed .installed .installed-test; then exit 0; fi
if [ -n "$extra" ] && is_installed ".installed-$extra"; then exit 0; fi
make_environment
install_fathom
if [ "$extra" = test ]; then
    install_triton
    install_llama
fi
warn_without_compiler
fingerprint >".venv/.installed${extra:+-$extra}"
