//! The command line of pghydrant.

fn main() {}
