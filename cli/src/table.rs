//! Aligned columns for people.

/// Rows of cells under a heading. Columns are as wide as their widest cell; numbers stand to the right.
#[derive(Debug)]
pub(crate) struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names; one that begins with `>` stands to the right.
    pub(crate) fn new(columns: &[&str]) -> Self {
        let heading = columns.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        Self { right: columns.iter().map(|name| name.starts_with('>')).collect(), rows: vec![heading] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines, each after `indent`.
    pub(crate) fn text(&self, indent: &str) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().enumerate().map(|(column, cell)| match self.right.get(column) {
                Some(true) => format!("{cell:>0$}", width(column)),
                _ => format!("{cell:<0$}", width(column)),
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            text.push_str(indent);
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_numbers_stand_to_the_right() {
        let mut table = Table::new(&["NAME", ">SIZE", "NOTE"]);
        table.row(["a".to_owned(), "1.5 GiB".to_owned(), String::new()]);
        table.row(["longer".to_owned(), "3 B".to_owned(), "ü".to_owned()]);
        assert_eq!(table.text("  "), "  NAME       SIZE  NOTE\n  a       1.5 GiB\n  longer      3 B  ü\n");
    }
}
