//! The mount: what *fusefs/SEMANTICS.md* says, what happens when something dies, and random reads beside a plain copy.
//!
//! Every mount here is a real one, served by the program in a process of its own, and has a watchdog: a read that hangs
//! is ended by aborting the connection, and so fails its test instead of stopping the machine.

mod attributes;
mod contents;
mod damage;
mod guard;
mod hung;
mod life;
mod many;
mod model;
mod reading;
mod refusals;
mod sample;
mod semantics;
