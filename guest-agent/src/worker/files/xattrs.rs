//! Extended attributes.

use std::ffi::{CStr, CString};

use belljar_protocol::v1::{self, error::Code};
use belljar_tree::attributes;
use rustix::fs::{XattrFlags, removexattr, setxattr};

use super::path::GuestPath;
use super::rights::{Rights, descriptor_path};
use super::{failed, refusal};
use crate::worker::Failure;

/// Sets, removes, then lists.
pub(super) fn xattrs(call: &v1::Xattrs) -> Result<v1::XattrList, Failure> {
    let path = GuestPath::new(&call.path)?;
    let rights = Rights::of(&call.user)?;
    let found = rights
        .find(&path, call.follow)
        .map_err(|errno| failed("find", &path, errno))?;
    // These calls take no descriptor that is only a path.
    let node = descriptor_path(&found);
    for xattr in &call.set {
        let name = name(&xattr.name)?;
        setxattr(&node, &name, &xattr.value, XattrFlags::empty())
            .map_err(|errno| failed(&format!("set attribute {} of", show(&name)), &path, errno))?;
    }
    for name_bytes in &call.remove {
        let name = name(name_bytes)?;
        removexattr(&node, &name).map_err(|errno| {
            failed(
                &format!("remove attribute {} of", show(&name)),
                &path,
                errno,
            )
        })?;
    }
    let list = attributes::of_path(&node)
        .map_err(|errno| failed("list the attributes of", &path, errno))?;
    let xattrs = list
        .into_iter()
        .map(|(name, value)| v1::Xattr {
            name: name.into_bytes(),
            value,
        })
        .collect();
    drop(rights);
    Ok(v1::XattrList { xattrs })
}

fn name(bytes: &[u8]) -> Result<CString, v1::Error> {
    CString::new(bytes)
        .ok()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| {
            refusal(
                Code::Invalid,
                "the name of an attribute is empty or holds a NUL byte",
            )
        })
}

fn show(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}
