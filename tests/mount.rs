//! The mount: what *fusefs/SEMANTICS.md* says, what happens when something dies, and random reads beside a plain copy.
//!
//! Every mount here is a real one, served by the program in a process of its own, and has a watchdog: a read that hangs
//! is ended by aborting the connection, and so fails its test instead of stopping the machine.

mod guard;
mod life;
mod model;
mod sample;
mod semantics;
