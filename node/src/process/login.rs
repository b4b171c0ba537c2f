//! The login shell of a guest's user.

/// Becomes the login shell of the user it runs as, in the home directory unless it is told to stay. The
/// agent sets USER and HOME.
const SCRIPT: &str = r#"shell=
while IFS=: read -r name x x x x x program; do
    if [ "$name" = "$USER" ]; then shell=$program; break; fi
done 2>/dev/null </etc/passwd
[ -n "$shell" ] && [ -x "$shell" ] || shell=/bin/sh
[ -n "$1" ] || cd 2>/dev/null
SHELL=$shell
export SHELL
exec "$shell" -l"#;

/// The arguments of a command that becomes the login shell that the guest's `/etc/passwd` names for the user it
/// runs as, `/bin/sh` if that is none. `stay`: in the directory it is started in, not in the home directory.
#[must_use]
pub fn login_shell(stay: bool) -> Vec<Vec<u8>> {
    let stays = if stay { "stays" } else { "" };
    ["/bin/sh", "-c", SCRIPT, "sh", stays]
        .map(|word| word.as_bytes().to_vec())
        .into()
}

/// Whether these are arguments of [`login_shell`], which are nothing to show to anybody.
#[must_use]
pub fn is_login_shell(argv: &[Vec<u8>]) -> bool {
    argv.get(2)
        .is_some_and(|script| script == SCRIPT.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    /// What the shell of an unknown user says that is asked for where it is.
    fn place(stay: bool) -> String {
        let words = login_shell(stay);
        let mut words = words.iter().map(|word| std::ffi::OsStr::from_bytes(word));
        let mut shell = Command::new(words.next().unwrap());
        shell.args(words).current_dir("/proc").env("HOME", "/");
        // Its standard input is the end of a pipe that says so.
        shell
            .env("USER", "no such user")
            .stdin(script("pwd; echo $SHELL"));
        String::from_utf8(shell.output().unwrap().stdout).unwrap()
    }

    fn script(text: &str) -> std::process::Stdio {
        let (reader, mut writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut writer, text.as_bytes()).unwrap();
        reader.into()
    }

    #[test]
    fn it_begins_at_home_or_stays() {
        assert_eq!(place(false), "/\n/bin/sh\n");
        assert_eq!(place(true), "/proc\n/bin/sh\n");
        assert!(is_login_shell(&login_shell(true)));
        assert!(!is_login_shell(&[b"sh".to_vec()]));
    }
}
