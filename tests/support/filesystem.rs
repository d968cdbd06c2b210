//! Small file systems on loop devices, and the mounts of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::tools::find_program;
use super::{Context, OsUser, Result, Run, Scratch};

/// A file system of its own, unmounted when dropped. Needs `requires!(LoopDevice)`.
pub struct SmallFileSystem {
    mountpoint: PathBuf,
}

impl SmallFileSystem {
    /// `kind`: ext3, ext4, xfs (from 300 MiB) or btrfs (from 110 MiB). Its root directory is the server user's.
    pub fn mount(scratch: &Scratch, name: &str, kind: &str, mebibytes: u64) -> Result<Self> {
        let image = scratch.join(&format!("{name}.image"));
        fs::File::create(&image)?.set_len(mebibytes << 20)?;
        let make = find_program(&format!("mkfs.{kind}")).with_context(|| format!("no mkfs.{kind}"))?;
        let quiet: &[&str] = if kind.starts_with("ext") { &["-q", "-m", "0"] } else { &["-q"] };
        Run::new(make).args(quiet).arg(&image).succeed()?;
        let mountpoint = scratch.directory(name)?;
        Run::new("mount").args(["-o", "loop"]).arg(&image).arg(&mountpoint).succeed()?;
        let mounted = Self { mountpoint };
        let user = OsUser::server();
        std::os::unix::fs::chown(mounted.path(), Some(user.uid), Some(user.gid))?;
        let _ = fs::remove_dir(mounted.path().join("lost+found"));
        Ok(mounted)
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// Takes the disk away from under whoever uses it, as far as the kernel lets one.
    pub fn detach(&self) -> Result<()> {
        Run::new("umount").arg("--lazy").arg(&self.mountpoint).succeed()?;
        Ok(())
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let unmount = |option: &[&str]| {
            let run = Run::new("umount").args(option).arg(&self.mountpoint).time_limit(Duration::from_secs(20));
            run.finish().is_ok_and(|finished| finished.code == Some(0))
        };
        if is_mounted(&self.mountpoint) && !unmount(&[]) {
            unmount(&["--lazy"]);
        }
    }
}

/// Mount points of this machine, with their file system types.
pub fn mounts() -> Vec<(PathBuf, String)> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = |line: &str| {
        let (fields, source) = line.split_once(" - ")?;
        let path = fields.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(path), source.split(' ').next()?.to_owned()))
    };
    text.lines().filter_map(mount).collect()
}

pub fn is_mounted(path: &Path) -> bool {
    mounts().iter().any(|(mountpoint, _)| mountpoint == path)
}

/// FUSE mounts at or below `root`: what a test must not leave.
pub fn fuse_mounts_below(root: &Path) -> Vec<PathBuf> {
    let ours = |(path, kind): (PathBuf, String)| (kind.starts_with("fuse") && path.starts_with(root)).then_some(path);
    mounts().into_iter().filter_map(ours).collect()
}
