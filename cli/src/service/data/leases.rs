//! Who may read what: one backup and its WAL to one session, for as long as the session lives.
//!
//! Leases are in memory alone. A service that starts again is told of them anew by whoever knows the sessions: with the
//! hash of the token, which is all that is ever kept of it, the clients go on as they were.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use engine::remote::frame::FailureCode;
use engine::remote::message::ByteRange;
use engine::remote::{Coverage, LeaseId, Reach, Token};
use engine::repository::{Backup, Cluster};
use engine::units::BackupLabel;
use tokio::sync::{Notify, OnceCell};

use super::LEASE_CONNECTIONS_MAX;
use super::limits::Limit;

/// Leases that have ended and are still known as such.
const ENDED_MAX: usize = 1024;

/// BLAKE3 of a token.
pub(crate) type TokenHash = blake3::Hash;

/// All leases of a service.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    leases: HashMap<LeaseId, Arc<Lease>>,
    ended: VecDeque<LeaseId>,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Lease {
    token: TokenHash,
    pub(super) coverage: Covered,
    pub(super) limit: Option<Limit>,
    /// Whose piece is next.
    pub(super) turn: tokio::sync::Mutex<()>,
    ended: AtomicBool,
    /// Wakes connections that have nothing to do when the lease ends.
    pub(super) end: Notify,
    connections: AtomicUsize,
    bytes: AtomicU64,
}

/// What a lease covers.
#[derive(Debug)]
pub(super) enum Covered {
    #[cfg(test)]
    Backup(Coverage),
    /// One backup of a cluster: the one whose manifest is asked for first.
    Choice(Box<Choice>),
    /// Of a store that is no repository.
    #[cfg(test)]
    Everything,
}

/// A lease whose client has still to choose its backup.
pub(super) struct Choice {
    cluster: Cluster,
    /// An earlier run of the service has seen what was chosen.
    only: Option<BackupLabel>,
    before: Coverage,
    chosen: OnceCell<Arc<Chosen>>,
    tell: Box<dyn Fn(&BackupLabel) + Send + Sync>,
}

/// What was chosen, and what of its packs is known so far.
#[derive(Debug)]
struct Chosen {
    coverage: Coverage,
    /// More is known.
    grown: Notify,
}

/// After a manifest that could not be read: its disk may come back.
const WALK_PAUSE: Duration = Duration::from_secs(1);

impl Chosen {
    /// Finds out which runs of packs the backup has, for as long as anybody else has use for it.
    fn walk(self: &Arc<Self>, backup: &Backup) {
        let is_wanted = || Arc::strong_count(self) > 1;
        while is_wanted() {
            let walked = self.coverage.walk(backup, &mut || {
                self.grown.notify_waiters();
                is_wanted()
            });
            match walked {
                Ok(()) => return self.grown.notify_waiters(),
                Err(error) => tracing::warn!("what backup {} covers: {error}", backup.info.label),
            }
            std::thread::sleep(WALK_PAUSE);
        }
    }
}

impl std::fmt::Debug for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Choice").field("cluster", self.cluster.name()).field("only", &self.only).finish_non_exhaustive()
    }
}

impl Covered {
    /// What may be read now; none where that is everything.
    pub(super) fn coverage(&self) -> Option<&Coverage> {
        match self {
            #[cfg(test)]
            Self::Backup(coverage) => Some(coverage),
            Self::Choice(choice) => Some(choice.chosen.get().map_or(&choice.before, |chosen| &chosen.coverage)),
            #[cfg(test)]
            Self::Everything => None,
        }
    }

    /// How much of `key` may be read, once it is known whether these ranges are among it.
    pub(super) async fn reach(&self, key: &str, ranges: &[ByteRange]) -> Reach {
        loop {
            // What is found from here on wakes it.
            let chosen = match self {
                Self::Choice(choice) => choice.chosen.get(),
                #[cfg(test)]
                Self::Backup(_) | Self::Everything => None,
            };
            let grown = chosen.map(|chosen| chosen.grown.notified());
            let reach = self.coverage().map_or(Reach::Whole, |coverage| coverage.reach(key));
            let is_known = match &reach {
                Reach::Only(runs) => ranges.iter().all(|range| runs.answer(&(range.offset..range.end())).is_some()),
                Reach::Whole | Reach::Nothing => true,
            };
            match grown {
                Some(grown) if !is_known => grown.await,
                _ => return reach,
            }
        }
    }

    /// Takes note of the choice, if `key` is one. Whoever cannot be given what it chose is refused as by any lease.
    pub(super) async fn choose(&self, key: &str) {
        let choice = match self {
            Self::Choice(choice) => choice,
            #[cfg(test)]
            Self::Backup(_) | Self::Everything => return,
        };
        if choice.chosen.get().is_some() {
            return;
        }
        // Of what an earlier run has seen chosen, the client may know the manifest already.
        let Some(label) = choice.only.clone().or_else(|| choice.before.manifest(key)) else { return };
        let (cluster, chosen) = (choice.cluster.clone(), label.clone());
        // A disk is waited for: not on the thread that serves others.
        let look = || {
            tokio::task::spawn_blocking(move || {
                let backup = cluster.backup(&chosen)?;
                let coverage = Coverage::begin(&backup);
                Ok::<_, engine::Error>((Arc::new(Chosen { coverage, grown: Notify::new() }), backup))
            })
        };
        let made = choice.chosen.get_or_try_init(|| async {
            match look().await {
                Ok(Ok((chosen, backup))) => {
                    (choice.tell)(&label);
                    let walked = Arc::clone(&chosen);
                    let walk = std::thread::Builder::new().name("coverage".to_owned());
                    walk.spawn(move || walked.walk(&backup)).map_err(|cause| cause.to_string())?;
                    Ok(chosen)
                }
                Ok(Err(error)) => Err(error.to_string()),
                Err(error) => Err(error.to_string()),
            }
        });
        if let Err(why) = made.await {
            tracing::warn!("backup {label} cannot be leased: {why}");
        }
    }
}

/// A connection that counts among those of its lease.
#[derive(Debug)]
pub(super) struct Admitted {
    lease: Arc<Lease>,
}

impl Leases {
    #[cfg(test)]
    /// A new lease: its number and its token, which is kept by nobody here. `bytes_a_second_max` is what its clients
    /// together get.
    pub(crate) fn issue(
        &self,
        coverage: Coverage,
        bytes_a_second_max: Option<u64>,
    ) -> std::io::Result<(LeaseId, Token)> {
        self.issue_covered(Covered::Backup(coverage), bytes_a_second_max)
    }

    #[cfg(test)]
    pub(super) fn issue_covered(
        &self,
        coverage: Covered,
        bytes_a_second_max: Option<u64>,
    ) -> std::io::Result<(LeaseId, Token)> {
        let (lease, token) = (LeaseId(random()?), Token::new(random()?));
        self.insert(lease, Self::hash(&token), coverage, bytes_a_second_max);
        Ok((lease, token))
    }

    /// What is to be kept of a token by whoever wants to issue its lease again.
    pub(crate) fn hash(token: &Token) -> TokenHash {
        blake3::hash(token.bytes())
    }

    #[cfg(test)]
    /// A lease that an earlier run of the service has issued.
    pub(crate) fn issue_again(
        &self,
        lease: LeaseId,
        token: TokenHash,
        coverage: Coverage,
        bytes_a_second_max: Option<u64>,
    ) {
        self.insert(lease, token, Covered::Backup(coverage), bytes_a_second_max);
    }

    fn insert(&self, id: LeaseId, token: TokenHash, coverage: Covered, bytes_a_second_max: Option<u64>) {
        let lease = Lease {
            token,
            coverage,
            limit: bytes_a_second_max.map(Limit::new),
            turn: tokio::sync::Mutex::default(),
            ended: AtomicBool::new(false),
            end: Notify::new(),
            connections: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
        };
        let mut known = self.known();
        known.ended.retain(|ended| *ended != id);
        if let Some(before) = known.leases.insert(id, Arc::new(lease)) {
            before.finish();
        }
    }

    /// A lease of one backup of `cluster`, which its client chooses: `only` that one, if it is known already. `tell` hears
    /// of the choice before anything of the backup is served.
    pub(crate) fn offer(
        &self,
        (lease, token): (LeaseId, TokenHash),
        cluster: Cluster,
        only: Option<BackupLabel>,
        bytes_a_second_max: Option<u64>,
        tell: Box<dyn Fn(&BackupLabel) + Send + Sync>,
    ) {
        let before = Coverage::of_descriptions(cluster.name());
        let choice = Choice { cluster, only, before, chosen: OnceCell::new(), tell };
        self.insert(lease, token, Covered::Choice(Box::new(choice)), bytes_a_second_max);
    }

    /// Number and token of a new lease.
    pub(crate) fn number() -> std::io::Result<(LeaseId, Token)> {
        Ok((LeaseId(random()?), Token::new(random()?)))
    }

    /// Ends a lease: its connections are cut off, and nothing more is read by it.
    pub(crate) fn end(&self, id: &LeaseId) {
        let mut known = self.known();
        let Some(lease) = known.leases.remove(id) else { return };
        if known.ended.len() == ENDED_MAX {
            known.ended.pop_front();
        }
        known.ended.push_back(*id);
        lease.finish();
    }

    /// Bytes of data that were sent by a lease; none if there is no such lease now.
    pub(crate) fn bytes_sent(&self, id: &LeaseId) -> Option<u64> {
        self.known().leases.get(id).map(|lease| lease.bytes.load(Ordering::Relaxed))
    }

    /// Lets a connection in, or says why not.
    pub(super) fn admit(&self, id: &LeaseId, token: &Token) -> Result<Admitted, FailureCode> {
        let known = self.known();
        let Some(lease) = known.leases.get(id) else {
            return Err(if known.ended.contains(id) { FailureCode::Ended } else { FailureCode::Refused });
        };
        // The comparison of hashes takes the same time for all.
        if Self::hash(token) != lease.token {
            return Err(FailureCode::Refused);
        }
        // Under the lock, so no two take the last place.
        if lease.connections.load(Ordering::Relaxed) >= LEASE_CONNECTIONS_MAX {
            return Err(FailureCode::Busy);
        }
        lease.connections.fetch_add(1, Ordering::Relaxed);
        Ok(Admitted { lease: Arc::clone(lease) })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A panic elsewhere cannot leave it half changed.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Whether nothing more may be read by it.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    pub(super) fn sent(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn finish(&self) {
        self.ended.store(true, Ordering::Release);
        self.end.notify_waiters();
    }
}

impl std::ops::Deref for Admitted {
    type Target = Lease;

    fn deref(&self) -> &Lease {
        &self.lease
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.lease.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_lease_lets_in_whoever_has_its_token_until_it_ends() {
        let leases = Leases::default();
        let (lease, token) = leases.issue_covered(Covered::Everything, None).unwrap();
        let (other, _) = leases.issue_covered(Covered::Everything, None).unwrap();
        let admitted = leases.admit(&lease, &token).unwrap();
        assert_eq!(leases.admit(&lease, &Token::new([0; 32])).unwrap_err(), FailureCode::Refused);
        assert_eq!(leases.admit(&other, &token).unwrap_err(), FailureCode::Refused);
        assert_eq!(leases.admit(&LeaseId([0; 16]), &token).unwrap_err(), FailureCode::Refused);
        assert!(!admitted.has_ended());
        leases.end(&lease);
        assert!(admitted.has_ended());
        assert_eq!(leases.admit(&lease, &token).unwrap_err(), FailureCode::Ended);
    }

    #[test]
    fn a_lease_has_so_many_connections_and_no_more() {
        let leases = Leases::default();
        let (lease, token) = leases.issue_covered(Covered::Everything, None).unwrap();
        let mut admitted: Vec<_> = (0..LEASE_CONNECTIONS_MAX).map(|_| leases.admit(&lease, &token).unwrap()).collect();
        assert_eq!(leases.admit(&lease, &token).unwrap_err(), FailureCode::Busy);
        admitted.pop();
        leases.admit(&lease, &token).unwrap();
    }
}
