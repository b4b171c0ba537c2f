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

# A target directory in the cache, for all checkouts. One that has grown too large is begun anew, unless somebody may be
# using it: no run takes as long as two hours.
shared_target() {
    local dir=${BELLJAR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/belljar}/target
    if [ -z "$(find "$dir/used" -mmin -120 2>/dev/null)" ] && [ "$(du -sm "$dir" 2>/dev/null | cut -f1)" -gt 12000 ] 2>/dev/null; then
        rm -rf "$dir"
    fi
    mkdir -p "$dir" && touch "$dir/used" && echo "$dir"
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
