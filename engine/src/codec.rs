//! How a block is stored: raw, lz4 or zstd.

use serde::{Deserialize, Serialize};

/// How one stored run of bytes is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// An lz4 block.
    Lz4 = 1,
    /// A zstd frame.
    Zstd = 2,
}

/// What a repository compresses with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compression {
    /// Every block raw.
    None,
    /// The C library's default level.
    Lz4,
    /// zstd at a level.
    Zstd {
        /// -7 to 19.
        level: i32,
    },
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.to_string()
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("\"{text}\" is not a compression: none, lz4, zstd or zstd:LEVEL (-7 to 19)");
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd { level: 1 }),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ -7..=19) => Ok(Self::Zstd { level }),
                _ => Err(refuse()),
            },
            _ => Err(refuse()),
        }
    }
}

impl TryFrom<String> for Compression {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}
