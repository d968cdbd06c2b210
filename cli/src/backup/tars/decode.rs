//! Compressed tars, told by their first bytes: gzip, an lz4 frame, zstd.
//!
//! Where the compressed bytes end before the decoder is done is an error of its own kind
//! ([`ErrorKind::UnexpectedEof`]), so that a stream that was cut is called that.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};

/// Bytes of one read of the file or pipe.
const READ_BYTES: usize = 1 << 20;

const GZIP: [u8; 2] = [0x1F, 0x8B];
const LZ4: [u8; 4] = [0x04, 0x22, 0x4D, 0x18];
const ZSTD: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
/// Compressions that PostgreSQL does not have: `xz`, `bzip2`.
const OTHERS: [(&[u8], &str); 2] = [(&[0xFD, b'7', b'z', b'X', b'Z'], "xz"), (b"BZh", "bzip2")];

/// The tar in `source`.
pub(super) fn decoded<'a>(source: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut source = BufReader::with_capacity(READ_BYTES, source);
    let begin = first_bytes(&mut source)?;
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| begin.starts_with(magic)) {
        let detail = format!("it is compressed with {name}; gzip, lz4 and zstd are known");
        return Err(io::Error::new(ErrorKind::Unsupported, detail));
    }
    let compression = [&GZIP[..], &LZ4, &ZSTD].into_iter().position(|magic| begin.starts_with(magic));
    let source = io::Cursor::new(begin).chain(source);
    Ok(match compression {
        Some(0) => Box::new(flate2::bufread::MultiGzDecoder::new(source)),
        Some(1) => Box::new(Lz4Frames::new(source)?),
        Some(_) => Box::new(zstd::Decoder::with_buffer(source)?),
        None => Box::new(source),
    })
}

/// As many bytes as the longest magic has, if there are as many.
fn first_bytes(source: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(5).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// One lz4 frame behind another. The decoder of one frame takes its end and the end of the bytes for the same.
struct Lz4Frames<R: BufRead> {
    /// None behind the last frame.
    frame: Option<lz4::Decoder<R>>,
}

impl<R: BufRead> Lz4Frames<R> {
    fn new(source: R) -> io::Result<Self> {
        Ok(Self { frame: Some(lz4::Decoder::new(source)?) })
    }
}

impl<R: BufRead> Read for Lz4Frames<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some(frame) = &mut self.frame {
            let read = frame.read(into)?;
            if read > 0 || into.is_empty() {
                return Ok(read);
            }
            let Some(frame) = self.frame.take() else { break };
            let (mut source, whole) = frame.finish();
            if whole.is_err() {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "an lz4 frame ends early"));
            }
            if !source.fill_buf()?.is_empty() {
                self.frame = Some(lz4::Decoder::new(source)?);
            }
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    fn compressed(content: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(content).unwrap();
        let mut lz4 = lz4::EncoderBuilder::new().build(Vec::new()).unwrap();
        lz4.write_all(content).unwrap();
        let (lz4, result) = lz4.finish();
        result.unwrap();
        let zstd = zstd::encode_all(content, 1).unwrap();
        vec![("gzip", gzip.finish().unwrap()), ("lz4", lz4), ("zstd", zstd)]
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        decoded(bytes)?.read_to_end(&mut content)?;
        Ok(content)
    }

    /// Compresses to many blocks of each kind.
    fn sample() -> Vec<u8> {
        (0..300_000_u32).flat_map(|number| (number.wrapping_mul(2_654_435_761) >> 20).to_le_bytes()).collect()
    }

    #[test]
    fn every_compression_is_told_by_its_first_bytes() {
        let content = sample();
        assert!(read(&content).unwrap() == content);
        assert_eq!(read(b"abc").unwrap(), b"abc");
        for (name, bytes) in compressed(&content) {
            assert!(read(&bytes).unwrap() == content, "{name}");
            // What was compressed in pieces is several streams, one behind another.
            let twice = [bytes.clone(), bytes].concat();
            assert!(read(&twice).unwrap() == [content.clone(), content.clone()].concat(), "{name}");
        }
    }

    #[test]
    fn what_was_cut_ends_early_and_what_was_changed_is_damaged() {
        for (name, bytes) in compressed(&sample()) {
            for cut in [8, bytes.len() / 2, bytes.len() - 1] {
                let error = read(&bytes[..cut]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{name} of {cut} bytes: {error}");
            }
        }
        assert_eq!(read(b"\xFD7zXZ\0").unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
