//! What a guest is made of, as calls of the VMM's API (`docs/api.md`).

use serde::Serialize;

/// One `PUT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub path: String,
    pub body: Vec<u8>,
}

/// A drive in the order the guest sees: the first is `/dev/vda`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// Name in the API and serial in the guest.
    pub drive_id: String,
    pub path_on_host: String,
    pub is_read_only: bool,
    pub is_root_device: bool,
    pub cache_type: CacheType,
    /// With [`Format::Layers`] `path_on_host` is the base image, and is only read.
    #[serde(skip_serializing_if = "Format::is_raw")]
    pub format: Format,
    /// Lowest first; the last one is written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<String>,
}

/// What a drive's bytes are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Layers,
}

impl Format {
    // As serde asks.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

/// Whether the guest's flushes reach the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum CacheType {
    /// The guest does not flush at all.
    Unsafe,
    /// It does, which does nothing: for a disk that goes away with the sandbox.
    Volatile,
    Writeback,
}

/// A whole guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub vcpus: u32,
    pub memory_mib: u64,
    pub kernel: String,
    pub initramfs: Option<String>,
    pub boot_args: String,
    pub drives: Vec<Drive>,
    /// Relative to the sandbox's directory, where the VMM runs.
    pub vsock_path: String,
    pub console_path: String,
}

#[derive(Serialize)]
struct MachineConfig {
    vcpu_count: u32,
    mem_size_mib: u64,
}

#[derive(Serialize)]
struct BootSource<'a> {
    kernel_image_path: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd_path: Option<&'a str>,
    boot_args: &'a str,
}

#[derive(Serialize)]
struct Vsock<'a> {
    guest_cid: u32,
    uds_path: &'a str,
}

#[derive(Serialize)]
struct Console<'a> {
    socket_path: &'a str,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct Action<'a> {
    action_type: &'a str,
}

/// Context id of every guest: 0 to 2 are taken, and each guest has a VMM of its own.
const GUEST_CID: u32 = 3;

impl Config {
    /// The calls that make and start this guest, the start last.
    ///
    /// # Errors
    /// None in practice: serialising plain structures does not fail.
    pub fn calls(&self) -> serde_json::Result<Vec<Call>> {
        let mut calls = vec![
            call(
                "/machine-config",
                &MachineConfig {
                    vcpu_count: self.vcpus,
                    mem_size_mib: self.memory_mib,
                },
            )?,
            call(
                "/boot-source",
                &BootSource {
                    kernel_image_path: &self.kernel,
                    initrd_path: self.initramfs.as_deref(),
                    boot_args: &self.boot_args,
                },
            )?,
        ];
        for drive in &self.drives {
            calls.push(call(&format!("/drives/{}", drive.drive_id), drive)?);
        }
        let vsock = Vsock {
            guest_cid: GUEST_CID,
            uds_path: &self.vsock_path,
        };
        let console = Console {
            socket_path: &self.console_path,
        };
        let start = Action {
            action_type: "InstanceStart",
        };
        calls.push(call("/vsock", &vsock)?);
        calls.push(call("/entropy", &Empty {})?);
        calls.push(call("/console", &console)?);
        calls.push(call("/actions", &start)?);
        Ok(calls)
    }
}

fn call(path: &str, body: &impl Serialize) -> serde_json::Result<Call> {
    Ok(Call {
        path: path.to_owned(),
        body: serde_json::to_vec(body)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_are_firecrackers_and_the_start_is_last() {
        let config = Config {
            vcpus: 2,
            memory_mib: 512,
            kernel: "/k".into(),
            initramfs: None,
            boot_args: "quiet".into(),
            drives: vec![Drive {
                drive_id: "image".into(),
                path_on_host: "/i".into(),
                is_read_only: true,
                is_root_device: false,
                cache_type: CacheType::Unsafe,
                format: Format::Raw,
                layers: Vec::new(),
            }],
            vsock_path: "v.sock".into(),
            console_path: "console.sock".into(),
        };
        let calls: Vec<String> = config
            .calls()
            .unwrap()
            .into_iter()
            .map(|call| format!("{} {}", call.path, String::from_utf8(call.body).unwrap()))
            .collect();
        assert_eq!(
            calls,
            [
                r#"/machine-config {"vcpu_count":2,"mem_size_mib":512}"#,
                r#"/boot-source {"kernel_image_path":"/k","boot_args":"quiet"}"#,
                r#"/drives/image {"drive_id":"image","path_on_host":"/i","is_read_only":true,"is_root_device":false,"cache_type":"Unsafe"}"#,
                r#"/vsock {"guest_cid":3,"uds_path":"v.sock"}"#,
                "/entropy {}",
                r#"/console {"socket_path":"console.sock"}"#,
                r#"/actions {"action_type":"InstanceStart"}"#,
            ]
        );
    }
}
