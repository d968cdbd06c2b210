//! Whether this user can mount through FUSE on this machine, and what to do if not.

use std::fs::File;
use std::path::{Path, PathBuf};

use fusefs::mounting::{DEVICE, HELPER};

use crate::exit::{Exit, Failure};

const CONFIGURATION: &str = "/etc/fuse.conf";
/// Where the helper looks for what it is to unmount: a link to `/proc/self/mounts`, which a bare chroot lacks.
const TABLE: &str = "/etc/mtab";

/// Why FUSE cannot be used, and the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) message: String,
    pub(crate) cure: String,
}

impl Reason {
    fn new(message: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { message: message.into(), cure: cure.into() }
    }

    fn into_failure(self) -> Failure {
        Failure::new(Exit::Failed, self.message).hint(self.cure)
    }
}

/// Whether this user can mount. Nothing is mounted to find out.
pub(crate) fn fuse_usable() -> Result<(), Reason> {
    if !Path::new(DEVICE).exists() {
        return Err(Reason::new(
            format!("{DEVICE} does not exist"),
            "as root: modprobe fuse (in a container: run it with --device /dev/fuse and CAP_SYS_ADMIN)",
        ));
    }
    if rustix::process::geteuid().is_root() { usable_as_root() } else { usable_by_helper(helper().as_deref()) }
}

fn usable_as_root() -> Result<(), Reason> {
    if let Err(cause) = File::options().read(true).write(true).open(DEVICE) {
        let error = engine::Error::io("open", DEVICE, cause);
        return Err(Reason::new(error.to_string(), "run the container with --device /dev/fuse"));
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if may_mount(&status) {
        return Ok(());
    }
    Err(Reason::new(
        "this root may not mount (no CAP_SYS_ADMIN)",
        "run the container with --cap-add SYS_ADMIN, or restore with --source blocks",
    ))
}

fn usable_by_helper(helper: Option<&Path>) -> Result<(), Reason> {
    let cure = "as root: apt-get install fuse3";
    let Some(helper) = helper else {
        return Err(Reason::new(format!("{HELPER} is not in PATH: users need it to mount"), cure));
    };
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let found = std::fs::metadata(helper);
    if !Path::new(TABLE).exists() {
        let message = format!("{TABLE} does not exist, and {HELPER} does not unmount without it");
        return Err(Reason::new(message, format!("as root: ln -s ../proc/self/mounts {TABLE}")));
    }
    let privileged = found.is_ok_and(|found| found.uid() == 0 && found.permissions().mode() & 0o4000 != 0);
    // It may have a capability instead of the bit; what it is refused then, it says itself.
    let by_capability = rustix::fs::getxattr(helper, "security.capability", &mut [0; 64]).is_ok();
    if privileged || by_capability {
        return Ok(());
    }
    Err(Reason::new(format!("{} is not setuid root, so it cannot mount", helper.display()), cure))
}

/// The effective capabilities have CAP_SYS_ADMIN.
fn may_mount(status: &str) -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok());
    // Where the kernel does not say, the mount itself will.
    bits.is_none_or(|bits| bits & CAP_SYS_ADMIN != 0)
}

fn helper() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(HELPER)).find(|helper| helper.is_file())
}

/// As a failure, for the verbs that mount.
pub(super) fn refuse_unless_usable() -> Result<(), Failure> {
    fuse_usable().map_err(Reason::into_failure)
}

/// Refuses `--allow-other` where the helper would.
pub(super) fn refuse_unless_others_allowed() -> Result<(), Failure> {
    let configuration = std::fs::read_to_string(CONFIGURATION).unwrap_or_default();
    if rustix::process::geteuid().is_root() || others_allowed(&configuration) {
        return Ok(());
    }
    Err(Reason::new(
        format!("users may not mount with --allow-other: {CONFIGURATION} has no user_allow_other"),
        format!("as root: echo user_allow_other >> {CONFIGURATION}"),
    )
    .into_failure())
}

fn others_allowed(configuration: &str) -> bool {
    configuration.lines().any(|line| line.trim() == "user_allow_other")
}

/// Who owns the files of a mount: root shows the recorded owners; for an ordinary user everything is its own, or it
/// could not read what it has mounted.
pub(super) fn own_owner() -> Option<(u32, u32)> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    (!user.is_root()).then(|| (user.as_raw(), group.as_raw()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status_of_the_process() {
        assert!(may_mount("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_mount("CapEff:\t00000000a80425fb\n"));
        assert!(may_mount(""));
    }

    #[test]
    fn a_comment_allows_nothing() {
        assert!(others_allowed("mount_max = 1000\nuser_allow_other\n"));
        assert!(!others_allowed("#user_allow_other\n"));
    }

    #[test]
    fn a_helper_that_is_missing_or_not_setuid_is_a_reason_with_a_cure() {
        assert!(usable_by_helper(None).unwrap_err().cure.contains("fuse3"));
        let place = tempfile::NamedTempFile::new().unwrap();
        assert!(usable_by_helper(Some(place.path())).unwrap_err().message.contains("setuid"));
    }
}
