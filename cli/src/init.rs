//! The verb `init`: a new repository.

use engine::codec::Compression;
use engine::repository::Repository;
use engine::units::BlockSize;
use serde_json::json;

use crate::context::Context;
use crate::exit::Exit;
use crate::human;
use crate::options::RepositoryOption;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    /// How blocks are stored: none, lz4, zstd or zstd:LEVEL
    #[arg(long, value_name = "CODEC", default_value_t = Compression::Lz4)]
    pub(crate) compression: Compression,
    /// Size of a block: a power of two from 32KiB to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "128KiB", value_parser = parse_block_size)]
    pub(crate) block_size: BlockSize,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let path = context.repository_path(&arguments.repository)?;
    let repository = Repository::init(&path, arguments.compression, arguments.block_size)?;
    let info = repository.info();
    let block = human::bytes(info.block_bytes.bytes() as u64);
    let text = format!("repository {} created: {} blocks, {}", path.display(), block, info.compression);
    context
        .output
        .result(&text, &json!({"repository": path.display().to_string(), "compression": info.compression, "block_bytes": info.block_bytes}));
    Ok(Exit::Done)
}

fn parse_block_size(text: &str) -> Result<BlockSize, String> {
    let bytes = human::parse_bytes(text)?;
    let bytes =
        u32::try_from(bytes).map_err(|_| format!("block size {text} is not a power of two from 32 KiB to 1 MiB"))?;
    BlockSize::try_from(bytes)
}
