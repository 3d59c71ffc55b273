#!/usr/bin/env bash
# Sets up an environment and runs the demo or the tests on it.
#
#   bash tools/run.sh demo [args]    a small DeepSeek-V3-shaped model, with its own attention and with cutehop's
#   bash tools/run.sh test [args]    ruff, mypy, pytest; args go to pytest
#   --venv DIR before the word       the environment's folder, default .venv
#
# A second run installs nothing unless pyproject.toml or the constraints changed. A CUDA build of torch that python3
# already has is used as it is. With no network, what is installed is used as far as it goes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
if [[ ${1:-} == --venv ]]; then venv=$2; shift 2; fi
mode=${1:-}
if [[ $mode != demo && $mode != test ]]; then
    sed -n '4,6s/^# //p' tools/run.sh >&2
    exit 2
fi
shift

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
die() { say "error: $*" >&2; exit 1; }
has() { "$venv/bin/python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }
driver_version() { nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true; }

# Prints the CUDA version that python3's own torch was built for; nothing if there is no such torch.
system_cuda() { python3 -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null || true; }

stamp() {
    { cat pyproject.toml tools/constraints-*.txt tools/run.sh; python3 -VV; ls /dev/nvidiactl 2>/dev/null || true; } |
        sha256sum | cut -d ' ' -f 1
}

# Sets variant (cpu, cu12, cu13), extras, constraints and reuse (yes: python3's torch serves).
choose() {
    local driver cuda
    reuse=no variant=cpu
    driver=$(driver_version)
    if [[ -n $driver ]]; then
        say "GPU driver $driver: asking python3 for a CUDA torch"
        cuda=$(system_cuda)
        if [[ -n $cuda ]]; then
            reuse=yes variant=cu${cuda%%.*}
            say "using python3's torch, built for CUDA $cuda"
        elif (( ${driver%%.*} >= 580 )); then
            variant=cu13
        else
            die "driver $driver is older than 580, which torch's CUDA 13 wheels need;" \
                "install a CUDA 12 torch for python3, then run this again"
        fi
    fi
    case $variant in
        cpu) extras=test,demo pins=(common cu12) ;;
        cu12 | cu13) extras=test,demo,$variant pins=(common "$variant") ;;
        *) die "torch is built for CUDA $cuda; cutehop has the extras cu12 and cu13" ;;
    esac
    # An unpinned torch brings gigabytes of CUDA wheels; a torch that is already there must not be replaced.
    [[ $reuse == yes ]] || pins+=(torch)
    constraints=()
    for pin in "${pins[@]}"; do constraints+=(-c "tools/constraints-$pin.txt"); done
}

create() {
    local options=()
    [[ $reuse == no ]] || options=(--system-site-packages)
    if [[ -e $venv/pyvenv.cfg ]]; then
        grep -q "^include-system-site-packages = $([[ $reuse == yes ]] && echo true || echo false)" "$venv/pyvenv.cfg" &&
            return
        say "$venv was made for another machine or torch: making it anew"
        options+=(--clear)
    fi
    say "creating $venv"
    # Some distributions ship venv without ensurepip; their own pip serves then.
    python3 -m venv "${options[@]}" "$venv" ||
        python3 -m venv "${options[@]}" --system-site-packages --without-pip "$venv"
    if [[ $reuse == yes ]] && ! has torch; then # python3 is itself a virtual environment, which --system-site-packages skips
        python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
            >"$(echo "$venv"/lib/python3*/site-packages)/torch-of-python3.pth"
    fi
}

install() {
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off)
    say "installing cutehop[$extras] for $variant: is everything already here?"
    if "${pip[@]}" --quiet --no-index --no-build-isolation "${constraints[@]}" -e ".[$extras]" >/dev/null 2>&1; then
        return
    fi
    say "no; installing from the package index (a few minutes)"
    if "${pip[@]}" "${constraints[@]}" -e ".[$extras]"; then
        return
    fi
    say "the package index did not serve everything: going on with the packages that are installed"
    complete=no
    "${pip[@]}" --quiet --no-index --no-build-isolation --no-deps -e . ||
        die "cutehop was not built: it needs setuptools 70.1, or 61 with wheel, and they could not be installed"
    has torch || die "torch is not installed and could not be; give this machine a network or a torch, then run this again"
}

set_up() {
    local want
    (($(python3 -c 'import sys; print(int(sys.version_info >= (3, 10)))'))) || die "python3 is older than 3.10"
    want=$(stamp)
    complete=yes
    if [[ $(cat "$venv/cutehop-stamp" 2>/dev/null) == "$want" ]]; then
        say "$venv is up to date"
        return
    fi
    choose
    create
    install
    [[ $complete == no ]] || echo "$want" >"$venv/cutehop-stamp"
}

# step NAME PACKAGE COMMAND...: runs a check, or says that it cannot where the installation is incomplete.
step() {
    local name=$1 package=$2
    shift 2
    if [[ $complete == no ]] && ! has "$package"; then
        say "$name: skipped, $package is not installed"
        skipped+=("$name")
        return
    fi
    say "$name"
    "$venv/bin/python" -m "$@" || failed+=("$name")
}

run_tests() {
    local selection=(-m "not gpu") failed=() skipped=()
    if "$venv/bin/python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
        selection=()
    fi
    step "ruff check" ruff ruff check .
    step "ruff format" ruff ruff format --check .
    step "mypy" mypy tools.typecheck
    step "pytest" pytest pytest "${selection[@]}" "$@"
    ((${#failed[@]} == 0)) || die "failed: ${failed[*]}"
    say "all checks passed${skipped[*]:+, but these could not run: ${skipped[*]}}"
}

set_up
if [[ $mode == demo ]]; then
    say "demo"
    "$venv/bin/python" -m tools.demo "$@"
else
    run_tests "$@"
fi
