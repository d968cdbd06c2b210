//! The memory of a mount: one pool of buffers with one limit.
//!
//! Everything that a mount keeps decoded, for read-ahead or for random readers, lies in a [`Buffer`] of one
//! [`Budget`]. Buffers come in power-of-two classes and return to the pool when dropped, so a stream does not pay
//! for page faults on every megabyte. What the pool keeps for reuse counts as held; it is given up first when
//! another class needs the room.
//!
//! Always true: `held() <= limit()`. There is no waiting for memory: a caller that gets nothing decodes into its
//! own scratch, or reads less far ahead.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The smallest buffer: a page of memory.
const CLASS_BYTES_MIN: usize = 4 << 10;
/// The largest buffer: one request of the kernel, and the largest block.
pub const BUFFER_BYTES_MAX: usize = 1 << 20;
const CLASSES: usize = (BUFFER_BYTES_MAX / CLASS_BYTES_MIN).trailing_zeros() as usize + 1;

const _: () = assert!(BUFFER_BYTES_MAX.is_power_of_two() && CLASS_BYTES_MIN.is_power_of_two());
const _: () = assert!(engine::units::BlockSize::MAX.bytes() <= BUFFER_BYTES_MAX);

/// A limit on memory, and the buffers under it.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    held: usize,
    idle: [Vec<Box<[u8]>>; CLASSES],
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, pool: Mutex::default() })
    }

    /// The bytes that may be held.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The bytes held now, idle buffers included.
    pub fn held(&self) -> usize {
        self.pool().held
    }

    /// A buffer of `bytes` if the budget has room for it, else nothing. Its content is arbitrary.
    pub fn buffer(self: &Arc<Self>, bytes: usize) -> Option<Buffer> {
        let (class, class_bytes) = class_of(bytes)?;
        let mut pool = self.pool();
        let memory = match pool.idle[class].pop() {
            Some(memory) => memory,
            None => {
                pool.give_up_idle(self.limit.checked_sub(class_bytes)?)?;
                pool.held += class_bytes;
                drop(pool);
                vec![0; class_bytes].into_boxed_slice()
            }
        };
        Some(Buffer { memory, bytes, budget: self.clone() })
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // A poisoned lock means that a thread panicked between two additions of integers: the counts still hold.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// Frees idle buffers, the largest first, until at most `wanted` bytes are held; nothing if that is not enough.
    fn give_up_idle(&mut self, wanted: usize) -> Option<()> {
        while self.held > wanted {
            let memory = self.idle.iter_mut().rev().find_map(Vec::pop)?;
            self.held -= memory.len();
        }
        Some(())
    }
}

fn class_of(bytes: usize) -> Option<(usize, usize)> {
    let class_bytes = bytes.max(CLASS_BYTES_MIN).checked_next_power_of_two()?;
    let class = (class_bytes / CLASS_BYTES_MIN).trailing_zeros() as usize;
    (class < CLASSES).then_some((class, class_bytes))
}

/// Memory paid for by a [`Budget`], which gets it back on drop.
#[derive(Debug)]
pub struct Buffer {
    memory: Box<[u8]>,
    bytes: usize,
    budget: Arc<Budget>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.bytes]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.bytes]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some((class, _)) = class_of(self.bytes) {
            let memory = std::mem::take(&mut self.memory);
            self.budget.pool().idle[class].push(memory);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn buffers_never_hold_more_than_the_limit() {
        let budget = Budget::new(3 << 20);
        let buffers: Vec<_> = (0..10).map_while(|_| budget.buffer(BUFFER_BYTES_MAX)).collect();
        assert_eq!(buffers.len(), 3);
        assert!(budget.buffer(1).is_none());
        assert_eq!(budget.held(), budget.limit());
    }

    #[test]
    fn idle_buffers_make_room_for_another_size() {
        let budget = Budget::new(1 << 20);
        drop(budget.buffer(BUFFER_BYTES_MAX).unwrap());
        let small = budget.buffer(5000).unwrap();
        assert_eq!(small.len(), 5000);
        assert_eq!(budget.held(), 8192);
    }

    #[test]
    fn a_buffer_comes_back_to_the_next_of_its_size() {
        let budget = Budget::new(1 << 20);
        let first = budget.buffer(131_072).unwrap();
        let place = first.as_ptr();
        drop(first);
        assert_eq!(budget.buffer(131_000).unwrap().as_ptr(), place);
    }

    #[test]
    fn what_is_larger_than_a_request_is_refused() {
        assert!(Budget::new(usize::MAX).buffer(BUFFER_BYTES_MAX + 1).is_none());
    }
}
