//! What pgbench's books must say: counts and sums that one lost or surplus transaction changes.

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::playground::Server;
use crate::exit::{Exit, Failure};

/// The books of a cluster at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Ledger {
    pub(super) accounts: i64,
    pub(super) balance: i64,
    pub(super) transactions: i64,
    pub(super) moved: i64,
}

const QUERY: &str = "SELECT (SELECT count(*) FROM pgbench_accounts), (SELECT sum(abalance) FROM pgbench_accounts), \
     (SELECT count(*) FROM pgbench_history), (SELECT sum(delta) FROM pgbench_history)";

impl Ledger {
    /// Reads the books.
    pub(super) fn of(server: &Server<'_>) -> Result<Self> {
        let text = server.sql(QUERY)?;
        Self::parse(&text).with_context(|| format!("the books cannot be read: \"{text}\""))
    }

    /// `accounts|balance|transactions|moved`, as `psql -At` prints a row.
    fn parse(row: &str) -> Option<Self> {
        let numbers: Vec<i64> = row.split('|').map(|field| field.parse().ok()).collect::<Option<_>>()?;
        let [accounts, balance, transactions, moved] = numbers[..] else { return None };
        Some(Self { accounts, balance, transactions, moved })
    }

    /// A table of both for people; an error unless they are equal and the amounts agree with the transactions.
    pub(super) fn compared_with(&self, restored: &Self) -> Result<String> {
        let rows = [
            ("accounts", self.accounts, restored.accounts),
            ("sum of balances", self.balance, restored.balance),
            ("transactions", self.transactions, restored.transactions),
            ("sum of amounts moved", self.moved, restored.moved),
        ];
        let line = |(name, before, after): (&str, i64, i64)| {
            format!("{name:<22} {:>20} {:>20}\n", grouped(before), grouped(after))
        };
        let head = format!("{:<22} {:>20} {:>20}\n", "", "before the disaster", "restored");
        let table = head + &rows.map(line).concat();
        // Each transaction adds its amount to one account and to the history: a torn restore breaks this sum.
        if self == restored && restored.balance == restored.moved {
            return Ok(table);
        }
        Err(Failure::new(Exit::Failed, format!("the restored books differ:\n{table}")).into())
    }
}

/// `1,234,567`.
pub(super) fn grouped(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = if number < 0 { "-".to_owned() } else { String::new() };
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn books_that_differ_or_do_not_add_up_are_refused() {
        let books = Ledger::parse("2000000|-50|7|-50").unwrap();
        assert!(books.compared_with(&books).unwrap().contains("2,000,000"));
        let one_more = Ledger { transactions: 8, ..books.clone() };
        assert!(books.compared_with(&one_more).is_err());
        let torn = Ledger { moved: -49, ..books.clone() };
        assert!(torn.compared_with(&torn).is_err());
        for bad in ["", "1|2|3", "1|2|3|x", "1|2|3|4|5"] {
            assert_eq!(Ledger::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(["0", "999", "-1,000", "1,234,567"], [0, 999, -1000, 1_234_567].map(grouped));
    }
}
