//! Random digits for names that must not meet another's: process ids and clocks repeat from one container to the next.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Six hexadecimal digits.
pub(crate) fn digits() -> Result<String, engine::Error> {
    let mut random = [0; 3];
    let source = Path::new("/dev/urandom");
    let read = File::open(source).and_then(|mut file| file.read_exact(&mut random));
    read.map_err(|cause| engine::Error::io("read", source, cause))?;
    let [a, b, c] = random;
    Ok(format!("{a:02x}{b:02x}{c:02x}"))
}
