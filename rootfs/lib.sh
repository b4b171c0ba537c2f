# Shared by the scripts of rootfs/ and kernel-config/: messages, the cache, downloads.
# To be sourced by bash. Results go to stdout, everything else to stderr.

set -euo pipefail
export LC_ALL=C
umask 022

cache_root="${BELLJAR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/belljar}"

say() { printf "%s\n" "${0##*/}: $*" >&2; }
die() { say "error: $*"; exit 1; }

# need COMMAND=PACKAGE…: stops with the one command that installs what is missing.
need() {
	local pair missing=()
	for pair; do
		case ${pair%%=*} in
		/*) [ -e "${pair%%=*}" ] || missing+=("${pair#*=}") ;;
		*) command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}") ;;
		esac
	done
	[ ${#missing[@]} -eq 0 ] || die "missing tools; run: apt-get install --no-install-recommends ${missing[*]}"
}

# Hash of all that is read on stdin, short enough for a directory name.
key() { sha256sum | cut -c1-24; }

# lock NAME: one builder at a time; the others wait and then find its result.
lock() {
	mkdir -p "$cache_root"
	exec 9>"$cache_root/$1.lock"
	flock -n 9 || { say "waiting for another build of $1"; flock 9; }
}

# scratch: a directory beside the cache entries (rename stays within one file system),
# removed at exit. Sets $work.
scratch() {
	mkdir -p "$cache_root/tmp"
	work=$(mktemp -d "$cache_root/tmp/$1.XXXXXX")
	trap 'rm -rf --one-file-system "$work"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
}

# publish DIR ENTRY: a finished entry appears at once and whole. Its neighbours that nothing
# has used for a month go.
publish() {
	local neighbours
	neighbours=$(dirname "$2")
	mkdir -p "$neighbours"
	rm -rf "$2"
	mv "$1" "$2"
	find "$neighbours" -mindepth 1 -maxdepth 1 ! -name work -mtime +30 -exec rm -rf {} +
}

# link NAME PATH: the newest of each part, under the name by which `belljar` finds it;
# the time of its directory tells when it was last used.
link() {
	touch -c "$(dirname "$2")"
	mkdir -p "$cache_root/assets"
	[ "$(readlink "$cache_root/assets/$1")" = "$2" ] && return
	ln -sf "$2" "$cache_root/assets/.$1.$$"
	mv -T "$cache_root/assets/.$1.$$" "$cache_root/assets/$1"
}

# deb PACKAGE: path of its .deb in the cache, downloaded by apt if there is none.
# A cached version is used until it is deleted, so that builds do not change by themselves.
deb() {
	local dir="$cache_root/apt" found
	mkdir -p "$dir"
	found=$(find "$dir" -maxdepth 1 -name "$1_*.deb" | sort -V | tail -n 1)
	if [ -z "$found" ]; then
		say "downloading $1"
		local tmp
		tmp=$(mktemp -d "$dir/.get.XXXXXX")
		chmod 755 "$tmp"
		if ! (cd "$tmp" && apt-get -qq download "$1" 2>"$tmp/log" >&2); then
			cat "$tmp/log" >&2
			rm -rf "$tmp"
			die "apt cannot download $1; is 'apt-get update' needed?"
		fi
		mv "$tmp"/*.deb "$dir/"
		rm -rf "$tmp"
		found=$(find "$dir" -maxdepth 1 -name "$1_*.deb" | sort -V | tail -n 1)
	fi
	printf '%s\n' "$found"
}
