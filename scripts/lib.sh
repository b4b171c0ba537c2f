# Shared by the scripts behind make's long targets; to be sourced by bash.

export PATH="$PATH:$HOME/.cargo/bin"

# Numbered and timed steps; the script sets `steps` to their number first.
# step TITLE COMMAND…: says what it does and how far things are; returns the command's status.
step() {
    local title=$1 begin=$SECONDS status=0
    shift
    step_number=$((${step_number:-0} + 1))
    printf '\n[%d/%d] %s\n' "$step_number" "$steps" "$title" >&2
    "$@" || status=$?
    if [ "$status" = 0 ]; then
        printf '[%d/%d] %s: done in %d s\n' "$step_number" "$steps" "$title" $((SECONDS - begin)) >&2
    else
        printf '[%d/%d] %s: FAILED with status %d after %d s\n' "$step_number" "$steps" "$title" "$status" $((SECONDS - begin)) >&2
    fi
    return "$status"
}

# Where cargo puts the release binaries of the workspace.
release_dir() {
    echo "$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/x86_64-unknown-linux-gnu/release"
}

# The words to put before a command that needs guests: none on hardware virtualisation. Leaves `host`.
choose_host() { # SECONDS
    host=()
    if [ "$(tests/host/need)" = emulated ]; then
        host=(tests/host/run -t "$1" --)
    fi
}
