//! Random digits: for names that must not meet another's, since process ids and clocks repeat from one container to the
//! next, and for secrets.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Six hexadecimal digits.
pub(crate) fn digits() -> Result<String, engine::Error> {
    hexadecimal(3)
}

/// So many random bytes, each as two digits.
pub(crate) fn hexadecimal(bytes: usize) -> Result<String, engine::Error> {
    let mut random = vec![0; bytes];
    let source = Path::new("/dev/urandom");
    let read = File::open(source).and_then(|mut file| file.read_exact(&mut random));
    read.map_err(|cause| engine::Error::io("read", source, cause))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
