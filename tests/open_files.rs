//! A process that may open few files.

use crate::support::tools::postgres_program;
use crate::support::*;

#[test]
fn a_restore_keeps_to_the_open_files_that_it_may_have() -> Result<()> {
    requires!(Postgres, Fuse, Tool("prlimit", "util-linux"));
    let world = World::new(4)?;
    world.backup()?;
    for source in ["mount", "blocks"] {
        let target = world.scratch.join(source);
        let to = target.display().to_string();
        let arguments = ["--to", &to, "--no-start", "--source", source];
        let limited = ["--nofile=96:96".to_owned(), world.pghydrant.binary.display().to_string()];
        let program = world.pghydrant.command_of("prlimit");
        program.args(limited).args(world.repository.arguments(&["restore"], &arguments)).succeed()?;
        Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
    }
    Ok(())
}
