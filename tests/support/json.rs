//! Looking for a field in JSON without caring where it stands: objects may grow around it.

use serde_json::Value;

/// The first field `name`, depth first.
pub fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields.get(name).or_else(|| fields.values().find_map(|value| find(value, name))),
        Value::Array(values) => values.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

/// Every field `name`.
pub fn find_all<'a>(value: &'a Value, name: &str) -> Vec<&'a Value> {
    match value {
        Value::Object(fields) => {
            let below = fields.values().flat_map(|value| find_all(value, name));
            fields.get(name).into_iter().chain(below).collect()
        }
        Value::Array(values) => values.iter().flat_map(|value| find_all(value, name)).collect(),
        _ => Vec::new(),
    }
}

pub fn find_number(value: &Value, name: &str) -> Option<u64> {
    find(value, name)?.as_u64()
}

pub fn find_text(value: &Value, name: &str) -> Option<String> {
    Some(find(value, name)?.as_str()?.to_owned())
}
