//! Where the guest's parts are: kernel, initramfs, image and preformatted disks.
//!
//! The build scripts leave one directory of symbolic links to the newest build of each part; everything
//! else in the cache is named by content. The names are a contract with `kernel-config/build` and
//! `rootfs/build`:
//!
//! | name | what | made by |
//! | --- | --- | --- |
//! | `vmlinux` | guest kernel, ELF | `make kernel` |
//! | `initramfs` | initramfs with the agent | `make image` |
//! | `image` | root file system, EROFS | `make image` |
//! | `disk-SIZE` | empty ext4 file system of SIZE (`disk-2G`) | `make image` |

use std::env;
use std::path::{Path, PathBuf};

use crate::size::Size;

/// Overrides the directory of links.
pub const ASSETS_VARIABLE: &str = "BELLJAR_ASSETS";
/// Size of the writable disk when none is asked for.
pub const DEFAULT_DISK: Size = Size(1 << 30);

/// A directory with the guest's parts.
#[derive(Debug, Clone)]
pub struct Assets {
    dir: PathBuf,
}

/// A part is not there.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    #[error("there is no {what} at {}", path.display())]
    Missing {
        what: &'static str,
        path: PathBuf,
        /// The `make` target that builds it.
        target: &'static str,
    },
    #[error("there is no empty disk of {size}{}", offer(sizes))]
    NoDiskOfSize { size: Size, sizes: Vec<Size> },
    #[error("neither HOME nor XDG_CACHE_HOME is set, so the guest's parts cannot be found")]
    NoHome,
    #[error("cannot use {what} {}: {source}", path.display())]
    Unusable {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

impl AssetError {
    /// What the user can do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Missing { target, .. } => {
                format!("run 'make {target}', or name another directory with --assets")
            }
            Self::NoDiskOfSize { sizes, .. } if sizes.is_empty() => {
                "run 'make image', or use --disk none".to_owned()
            }
            Self::NoDiskOfSize { .. } => {
                "use one of these sizes with --disk, or make others with 'rootfs/disk SIZE'"
                    .to_owned()
            }
            Self::NoHome => format!("set {ASSETS_VARIABLE} or give --assets DIR"),
            Self::Unusable { .. } => "name a readable file".to_owned(),
        }
    }
}

fn offer(sizes: &[Size]) -> String {
    if sizes.is_empty() {
        return String::new();
    }
    let names: Vec<String> = sizes.iter().map(Size::to_string).collect();
    format!(" (there are: {})", names.join(", "))
}

/// The project's cache: `${XDG_CACHE_HOME:-$HOME/.cache}/belljar`.
#[must_use]
pub fn cache_dir() -> Option<PathBuf> {
    user_dir("XDG_CACHE_HOME", ".cache")
}

pub(crate) fn user_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|dir| dir.is_absolute())
    };
    absolute(variable)
        .or_else(|| Some(absolute("HOME")?.join(below_home)))
        .map(|dir| dir.join("belljar"))
}

impl Assets {
    /// `explicit` if given, else `BELLJAR_ASSETS`, else `assets` in the project's cache.
    ///
    /// # Errors
    /// `NoHome` if none of them is known.
    pub fn locate(explicit: Option<&Path>) -> Result<Self, AssetError> {
        let dir = explicit
            .map(Path::to_path_buf)
            .or_else(|| env::var_os(ASSETS_VARIABLE).map(PathBuf::from))
            .or_else(|| Some(cache_dir()?.join("assets")))
            .ok_or(AssetError::NoHome)?;
        Ok(Self { dir })
    }

    /// The directory itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// # Errors
    /// `Missing`, with the target that makes it.
    pub fn kernel(&self) -> Result<PathBuf, AssetError> {
        self.part("guest kernel", "vmlinux", "kernel")
    }

    /// # Errors
    /// `Missing`, with the target that makes it.
    pub fn initramfs(&self) -> Result<PathBuf, AssetError> {
        self.part("initramfs", "initramfs", "image")
    }

    /// # Errors
    /// `Missing`, with the target that makes it.
    pub fn image(&self) -> Result<PathBuf, AssetError> {
        self.part("guest image", "image", "image")
    }

    /// The preformatted disk of exactly this size.
    ///
    /// # Errors
    /// `NoDiskOfSize`, with the sizes there are.
    pub fn disk(&self, size: Size) -> Result<PathBuf, AssetError> {
        let path = self.dir.join(format!("disk-{size}"));
        if path.exists() {
            return Ok(path);
        }
        Err(AssetError::NoDiskOfSize {
            size,
            sizes: self.disk_sizes(),
        })
    }

    /// The sizes of the preformatted disks, smallest first.
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<Size> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        let mut sizes: Vec<Size> = entries
            .filter_map(|entry| {
                let name = entry.ok()?.file_name();
                name.to_str()?.strip_prefix("disk-")?.parse().ok()
            })
            .collect();
        sizes.sort_unstable();
        sizes
    }

    fn part(
        &self,
        what: &'static str,
        name: &str,
        target: &'static str,
    ) -> Result<PathBuf, AssetError> {
        let path = self.dir.join(name);
        if path.exists() {
            Ok(path)
        } else {
            Err(AssetError::Missing { what, path, target })
        }
    }
}

/// Checks that a file named by the user can be read, and makes its path absolute, because the VMM runs
/// in the sandbox's directory.
///
/// # Errors
/// `Unusable` with the reason.
pub fn absolute_file(what: &'static str, path: &Path) -> Result<PathBuf, AssetError> {
    let unusable = |source| AssetError::Unusable {
        what,
        path: path.to_path_buf(),
        source,
    };
    let absolute = std::path::absolute(path).map_err(unusable)?;
    let file = std::fs::File::open(&absolute).map_err(unusable)?;
    if file.metadata().map_err(unusable)?.is_dir() {
        return Err(unusable(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_files(names: &[&str]) -> (tempfile::TempDir, Assets) {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        let assets = Assets::locate(Some(dir.path())).unwrap();
        (dir, assets)
    }

    #[test]
    fn a_missing_part_names_its_make_target() {
        let (_dir, assets) = with_files(&["vmlinux"]);
        assert!(assets.kernel().is_ok());
        let error = assets.image().unwrap_err();
        assert!(error.to_string().contains("guest image"), "{error}");
        assert!(error.remedy().contains("make image"), "{}", error.remedy());
    }

    #[test]
    fn a_disk_of_another_size_is_not_taken() {
        let (_dir, assets) = with_files(&["disk-2G", "disk-512M", "disk-odd"]);
        assert!(assets.disk("2048M".parse().unwrap()).is_ok());
        let error = assets.disk("3G".parse().unwrap()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no empty disk of 3G (there are: 512M, 2G)"
        );
    }

    #[test]
    fn a_directory_is_no_image() {
        let dir = tempfile::tempdir().unwrap();
        assert!(absolute_file("drive", dir.path()).is_err());
        assert!(absolute_file("drive", &dir.path().join("none")).is_err());
    }
}
