//! Contestants, and the rounds in which they take turns.

use crate::measure::{Figure, measure};
use crate::options::Section;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// Further times of the same run, by name: what a server's log says of its replay.
pub(crate) type Also = Vec<(&'static str, f64)>;

type Step<'w> = Box<dyn FnMut() -> anyhow::Result<()> + 'w>;

/// What one run is worth besides its own wall time.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// By the program's own clock, where its start is no part of what is measured.
    pub(crate) seconds: Option<f64>,
    /// Of the harness itself, where it does the work.
    pub(crate) own_cpu_seconds: f64,
    pub(crate) also: Also,
}

/// One of those that do the same work.
pub(crate) struct Contestant<'w> {
    name: String,
    kind: Kind,
    prepare: Option<Step<'w>>,
    run: Box<dyn FnMut() -> anyhow::Result<Outcome> + 'w>,
    check: Option<Step<'w>>,
    finish: Option<Step<'w>>,
    keeps_target: bool,
    hot: bool,
    syncs: bool,
}

impl<'w> Contestant<'w> {
    pub(crate) fn new(kind: Kind, name: impl Into<String>, mut run: impl FnMut() -> anyhow::Result<()> + 'w) -> Self {
        Self::with_outcome(kind, name, move || run().map(|()| Outcome::default()))
    }

    pub(crate) fn with_outcome(
        kind: Kind,
        name: impl Into<String>,
        run: impl FnMut() -> anyhow::Result<Outcome> + 'w,
    ) -> Self {
        let (prepare, check, finish) = (None, None, None);
        let name = name.into();
        Self { name, kind, prepare, run: Box::new(run), check, finish, keeps_target: false, hot: false, syncs: true }
    }

    /// Before each run, not counted.
    pub(crate) fn prepare(mut self, step: impl FnMut() -> anyhow::Result<()> + 'w) -> Self {
        self.prepare = Some(Box::new(step));
        self
    }

    /// After the first run, not counted: is what it made right?
    pub(crate) fn check(mut self, step: impl FnMut() -> anyhow::Result<()> + 'w) -> Self {
        self.check = Some(Box::new(step));
        self
    }

    /// After each run, and after one that failed.
    pub(crate) fn finish(mut self, step: impl FnMut() -> anyhow::Result<()> + 'w) -> Self {
        self.finish = Some(Box::new(step));
        self
    }

    /// Works on the target as it is.
    pub(crate) fn keeping_target(mut self) -> Self {
        self.keeps_target = true;
        self
    }

    /// Caches stay as `prepare` leaves them.
    pub(crate) fn hot(mut self) -> Self {
        self.hot = true;
        self
    }

    /// Nothing is written that would have to be durable.
    pub(crate) fn without_sync(mut self) -> Self {
        self.syncs = false;
        self
    }

    fn take_turn(&mut self, world: &World, first: bool) -> anyhow::Result<(Figure, Also)> {
        if !self.keeps_target {
            remove(&world.target())?;
        }
        world.drop_caches()?;
        if let Some(prepare) = &mut self.prepare {
            prepare()?;
            if !self.hot {
                world.drop_caches()?;
            }
        }
        let syncs = self.syncs;
        let (mut figure, outcome) = measure(world, || {
            let outcome = (self.run)()?;
            if syncs {
                world.sync()?;
            }
            Ok(outcome)
        })?;
        figure.seconds = outcome.seconds.unwrap_or(figure.seconds);
        figure.cpu_seconds += outcome.own_cpu_seconds;
        if let Some(check) = self.check.as_mut().filter(|_| first) {
            check()?;
        }
        Ok((figure, outcome.also))
    }
}

/// All contestants, round after round. One that fails is out, and its reason is kept; the others go on.
pub(crate) fn hold(
    world: &World,
    report: &mut Report,
    section: Section,
    work: Work,
    mut contestants: Vec<Contestant<'_>>,
) -> anyhow::Result<()> {
    for round in 1..=world.options.rounds {
        let mut failed = Vec::new();
        for contestant in &mut contestants {
            let mut turn = contestant.take_turn(world, round == 1);
            if let Some(finish) = &mut contestant.finish {
                let finished = finish();
                turn = turn.and_then(|turn| finished.map(|()| turn));
            }
            world.check_interrupt()?;
            match turn {
                Ok((figure, also)) => {
                    let Figure { seconds, cpu_seconds, .. } = figure;
                    eprintln!("  {round}: {}: {seconds:.2} s, {cpu_seconds:.2} CPU-s", contestant.name);
                    report.add(section, &contestant.name, contestant.kind, work, figure);
                    for (what, seconds) in also {
                        let name = format!("{}: {what}", contestant.name);
                        let figure = Figure { seconds, cpu_seconds: 0.0, peak_bytes: 0 };
                        report.add(section, &name, contestant.kind, Work::Nothing, figure);
                    }
                }
                Err(error) => {
                    eprintln!("  {round}: {} failed: {error:#}", contestant.name);
                    report.leave_out(section, &contestant.name, contestant.kind, format!("failed: {error:#}"));
                    failed.push(contestant.name.clone());
                }
            }
        }
        contestants.retain(|contestant| !failed.contains(&contestant.name));
    }
    remove(&world.target())
}
