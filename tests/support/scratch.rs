//! A directory for one test, on disk, that the server's user can reach; gone afterwards.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::{Context, OsUser, Result};

/// Gone on drop, unless `PGHYDRANT_TEST_KEEP` is set and the test failed.
pub struct Scratch {
    directory: Option<tempfile::TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// `/var/tmp` is on disk where `/tmp` may be memory; `PGHYDRANT_TEST_DIR` names another place.
    pub fn new() -> Result<Self> {
        let place = std::env::var_os("PGHYDRANT_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        let directory = tempfile::Builder::new()
            .prefix("pghydrant-test-")
            .tempdir_in(&place)
            .with_context(|| format!("cannot make a directory in {}", place.display()))?;
        let path = directory.path().to_owned();
        let scratch = Self { directory: Some(directory), path };
        scratch.own(&scratch.path, 0o755)?;
        Ok(scratch)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it; nothing is made.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A new directory in it, the server user's, mode 0700.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        self.own(&path, 0o700)?;
        Ok(path)
    }

    fn own(&self, path: &Path, mode: u32) -> Result<()> {
        let user = OsUser::server();
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("cannot chown {}", path.display()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let keep = std::env::var_os("PGHYDRANT_TEST_KEEP").is_some() && std::thread::panicking();
        if let Some(directory) = self.directory.take()
            && keep
        {
            eprintln!("kept: {}", directory.keep().display());
        }
    }
}
