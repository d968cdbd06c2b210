//! PostgreSQL: its programs, its control file, its instances, its SQL.
