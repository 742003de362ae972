//! Fields of a request whose dialect translates it into a chat request: those of the dialect's own table are read here, and all others are
//! a chat's.

use serde_json::{Map, Value};

use crate::api::fields::refuse::{passes, unsupported};
use crate::api::fields::table::FieldSpec;
use crate::api::fields::{Field, kind, wrong_type};
use crate::error::Failure;

/// The top level of a request's body.
pub struct Rows<'a> {
    table: &'static [FieldSpec],
    object: &'a Map<String, Value>,
}

impl<'a> Rows<'a> {
    /// Refuses what the table refuses.
    pub fn new(table: &'static [FieldSpec], body: &'a Value) -> Result<Self, Failure> {
        let Value::Object(object) = body else {
            return Err(Failure::bad_request("body", format!("The request body must be a JSON object, but it is {}.", kind(body))));
        };
        let rows = Self { table, object };
        let refused = |spec: &&FieldSpec| {
            let given = rows.get(spec.name);
            given.is_some_and(|field| spec.neutral.is_some_and(|neutral| !passes(field.value, neutral)))
        };
        match table.iter().find(refused) {
            Some(spec) => Err(unsupported(spec.name)),
            None => Ok(rows),
        }
    }

    /// Everything that the table has no row for, as it is.
    pub fn others(&self) -> Map<String, Value> {
        let own = |name: &str| self.table.iter().any(|spec| spec.name == name);
        self.object.iter().filter(|(name, _)| !own(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// A field of any name that is there and not null.
    pub fn get(&self, name: &str) -> Option<Field<'a>> {
        member(None, self.object, name)
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, Failure> {
        self.get(name).map(|field| field.value.as_bool().ok_or_else(|| wrong_type(&field, "true or false"))).transpose()
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, Failure> {
        self.get(name).map(|field| string(&field)).transpose()
    }

    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, Failure> {
        self.get(name).map(|field| object(&field, "an object")).transpose()
    }

    /// The elements of a list, with their names; none when it is absent.
    pub fn list(&self, name: &str) -> Result<Vec<Field<'a>>, Failure> {
        self.get(name).map_or(Ok(Vec::new()), |field| elements(&field, "a list"))
    }
}

/// A member of an object that is there and not null, with its full name.
pub fn member<'a>(parent: Option<&str>, object: &'a Map<String, Value>, name: &str) -> Option<Field<'a>> {
    let value = object.get(name).filter(|value| !value.is_null())?;
    Some(Field { name: parent.map_or_else(|| name.to_owned(), |parent| format!("{parent}.{name}")), value })
}

pub fn string<'a>(field: &Field<'a>) -> Result<&'a str, Failure> {
    field.value.as_str().ok_or_else(|| wrong_type(field, "a string"))
}

pub fn object<'a>(field: &Field<'a>, expected: &str) -> Result<&'a Map<String, Value>, Failure> {
    field.value.as_object().ok_or_else(|| wrong_type(field, expected))
}

/// The elements of a list, with their names.
pub fn elements<'a>(field: &Field<'a>, expected: &str) -> Result<Vec<Field<'a>>, Failure> {
    let list = field.value.as_array().ok_or_else(|| wrong_type(field, expected))?;
    Ok(list.iter().enumerate().map(|(i, value)| Field { name: format!("{}[{i}]", field.name), value }).collect())
}
