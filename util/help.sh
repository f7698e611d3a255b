# Sourced with the name of a training script and the words of a command line, before util/setup.sh: where --help is among
# them, it is that of the script. It needs no package, so nothing is installed and no GPU is looked for.

for word in "${@:2}"; do
    if [ "$word" = -h ] || [ "$word" = --help ]; then
        python="${PYTHON:-.venv/bin/python}"
        [ -x "$(command -v "$python")" ] || python=python3
        exec "$python" "$1" --help
    fi
done
