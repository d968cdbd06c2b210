//! Histories: a cluster that is restored, promoted and archived again and again.
//!
//! A model knows what must be visible at every restore point of every timeline. Whatever was done, and wherever the
//! history turned, each point stays reachable on its own timeline, and `latest` is the newest timeline's end.

use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::support::json::find_text;
use crate::support::*;

/// Histories in `make test`; each restores about ten times.
const HISTORIES: u32 = 2;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// A transaction and a restore point behind it.
    Work,
    Backup,
    /// Back to some earlier point (this one, counted round), which becomes the cluster's present on a new timeline.
    GoBack(usize),
}

/// A restore point, where it was made, and what there was by then.
#[derive(Clone, Debug)]
struct Point {
    name: String,
    timeline: u32,
    marks: BTreeSet<String>,
}

/// The cluster as it is now.
struct Present {
    server: Instance,
    timeline: u32,
    marks: BTreeSet<String>,
}

struct Model {
    world: World,
    points: Vec<Point>,
    /// Data directories that were the present, in order.
    directories: Vec<PathBuf>,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![3 => Just(Step::Work), 1 => Just(Step::Backup), 2 => (0usize..20).prop_map(Step::GoBack)]
}

impl Model {
    fn new() -> Result<(Self, Present)> {
        let world = World::new(0)?;
        world.mark("first")?;
        world.backup()?;
        let server = Instance::running_in(&world.cluster.data)?;
        let present = Present { server, timeline: 1, marks: BTreeSet::from(["first".to_owned()]) };
        Ok((Self { world, points: Vec::new(), directories: Vec::new() }, present))
    }

    fn work(&mut self, present: &mut Present) -> Result<()> {
        let name = format!("p{}", self.points.len());
        present.server.sql(&format!("INSERT INTO marks (name) VALUES ('{name}')"))?;
        present.marks.insert(name.clone());
        present.server.sql(&format!("SELECT pg_create_restore_point('{name}')"))?;
        self.points.push(Point { name, timeline: present.timeline, marks: present.marks.clone() });
        Ok(())
    }

    fn back_up(&self, present: &Present) -> Result<()> {
        let connection = present.server.connection_string();
        self.world.pghydrant.succeed(self.world.repository.arguments(&["backup"], &["--dbname", &connection]))?;
        Ok(())
    }

    /// `restore` to `point` in a directory of its own.
    fn restore(&self, to: &std::path::Path, point: &Point, more: &[&str]) -> Result<Instance> {
        let timeline = point.timeline.to_string();
        let target = ["--target-name", &point.name, "--target-timeline", &timeline];
        self.world.restore_to(to, &[&target, more].concat())?.expect_code(0)?;
        Instance::running_in(to)
    }

    fn go_back(&mut self, present: Present, point: &Point) -> Result<Present> {
        present.server.archive_wal()?;
        present.server.stop("fast")?;
        let before = present.timeline;
        drop(present);
        let directory = self.world.scratch.join(&format!("present-{}", self.directories.len()));
        let server = self.restore(&directory, point, &["--adopt"])?;
        self.directories.push(directory);
        let timeline =
            server.number("SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int")?;
        let timeline = u32::try_from(timeline)?;
        ensure!(timeline > before, "timeline {timeline} came after {before}");
        ensure!(marks_of(&server)? == point.marks, "{point:?}: {:?}", marks_of(&server)?);
        Ok(Present { server, timeline, marks: point.marks.clone() })
    }

    /// Everything that ever was can be had again.
    fn check(&self, present: &Present) -> Result<()> {
        let target = self.world.target();
        let plan = self.world.restore_to(&target, &["--plan", "--json"])?.expect_code(0)?;
        let shown = find_text(&plan.json()?, "target").context("the plan has no target")?;
        ensure!(
            shown.contains(&format!("timeline {}", present.timeline)),
            "{shown} is not timeline {}",
            present.timeline
        );
        let latest = self.world.restore(&[])?;
        ensure!(marks_of(&latest)? == present.marks, "latest: {:?}, not {:?}", marks_of(&latest)?, present.marks);
        drop(latest);
        std::fs::remove_dir_all(&target)?;
        for point in &self.points {
            let restored = self.restore(&target, point, &["--source", "blocks"])?;
            ensure!(marks_of(&restored)? == point.marks, "{point:?}: {:?}", marks_of(&restored)?);
            drop(restored);
            std::fs::remove_dir_all(&target)?;
        }
        self.world.pghydrant.succeed(["verify", "--repo", &self.world.repository.shown()])?;
        Ok(())
    }
}

fn marks_of(server: &Instance) -> Result<BTreeSet<String>> {
    Ok(marks(server)?.split(',').filter(|mark| !mark.is_empty()).map(str::to_owned).collect())
}

fn history_holds(steps: &[Step]) -> Result<()> {
    let (mut model, mut present) = Model::new()?;
    model.work(&mut present)?;
    for step in steps {
        match step {
            Step::Work => model.work(&mut present)?,
            Step::Backup => model.back_up(&present)?,
            Step::GoBack(which) => {
                let point = model.points[which % model.points.len()].clone();
                present = model.go_back(present, &point)?;
            }
        }
    }
    model.work(&mut present)?;
    present.server.archive_wal()?;
    model.check(&present)
}

#[test]
fn every_moment_of_any_history_can_be_restored() -> Result<()> {
    requires!(Postgres, Fuse);
    let cases = std::env::var("PGHYDRANT_HISTORIES").ok().and_then(|text| text.parse().ok()).unwrap_or(HISTORIES);
    // A failure is a minute of servers: shrinking it would take an hour, and the steps are few.
    let config = Config { failure_persistence: None, max_shrink_iters: 0, ..Config::with_cases(cases) };
    let steps = prop::collection::vec(step(), 4..7);
    let holds = |steps: Vec<Step>| history_holds(&steps).map_err(|error| TestCaseError::fail(format!("{error:#}")));
    TestRunner::new(config).run(&steps, holds).map_err(|error| anyhow::anyhow!("{error}"))
}

#[test]
fn three_times_restored_promoted_and_restored_again() -> Result<()> {
    requires!(Postgres, Fuse);
    // Back to the first point, on to a branch, back to the trunk, and back to the branch.
    history_holds(&[
        Step::Work,
        Step::GoBack(0),
        Step::Work,
        Step::Backup,
        Step::GoBack(1),
        Step::Work,
        Step::GoBack(2),
    ])
}
