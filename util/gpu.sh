# Sourced after util/setup.sh: a GPU that its maker's tool sees and torch does not must not mean the CPU without a word.

# The tool that sees a GPU of this machine; nothing where none does. grep reads to the end, since a tool that can no
# longer write to it would fail.
tool_that_sees_a_gpu() {
    if nvidia-smi -L 2>/dev/null | grep GPU >/dev/null; then
        echo nvidia-smi
    elif rocm-smi --showid 2>/dev/null | grep '^GPU\[' >/dev/null; then
        echo rocm-smi
    elif amd-smi list 2>/dev/null | grep '^GPU: *[0-9]' >/dev/null; then
        echo amd-smi
    fi
}

# Stop where torch does not see what $1, a tool, sees; the other arguments are said at the end.
stop_unless_torch_sees_it() {
    local tool="$1" problem driver index
    shift
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && return
    problem="$tool sees a GPU, but torch cannot use it: $("$python" -c \
        'import torch; print(f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, ROCm {torch.version.hip}")')"
    if [ "$tool" = nvidia-smi ]; then
        driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
        stop "$problem," "and the driver is $driver. Update the driver, or install a torch built for it (pytorch.org)." "$@"
    fi
    if "$python" -c 'import sys, torch; sys.exit(not torch.version.hip)'; then
        stop "$problem." "Its driver may not fit (rocminfo tells), or you are not in its groups: sudo usermod -aG render,video \$USER" "$@"
    fi
    index=https://download.pytorch.org/whl/rocm7.2
    stop "$problem." "Install a torch built for ROCm, of the version that pytorch.org/get-started/locally names today:" \
        "$(install_line --force-reinstall torch torchvision --index-url $index)" "$@"
}
