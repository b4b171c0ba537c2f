# Numbered and timed steps for the long targets; to be sourced. Set `steps` to their number first.

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
