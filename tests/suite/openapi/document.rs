//! A description of an API: what it says of an answer, and whether that is so.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Map, Value, json};

use super::calls::Answer;

/// An OpenAPI document.
pub struct Document {
    /// The document.
    pub value: Value,
    /// Its components, with the members of objects that are described being all that there may be.
    strict: Value,
}

/// One operation of a document.
pub struct Operation {
    pub id: String,
    pub method: Method,
    /// Its path, with parameters in braces.
    pub template: String,
    pub value: Value,
}

impl Document {
    pub fn new(value: Value) -> Self {
        let mut parts = BTreeSet::new();
        find_parts(&value, &mut parts);
        let mut strict = value["components"].clone();
        for (name, schema) in strict["schemas"].as_object_mut().unwrap() {
            close(schema, parts.contains(name));
        }
        Self { value, strict }
    }

    pub fn operations(&self) -> Vec<Operation> {
        let mut operations = Vec::new();
        for (template, item) in self.value["paths"].as_object().unwrap() {
            for (method, value) in item.as_object().unwrap() {
                let id =
                    value["operationId"].as_str().unwrap_or_else(|| panic!("{method} {template} has no id"));
                let method = method.to_uppercase().parse().unwrap();
                let (id, template) = (id.to_owned(), template.clone());
                operations.push(Operation { id, method, template, value: value.clone() });
            }
        }
        operations
    }

    /// Every reference leads somewhere.
    pub fn check_references(&self) {
        each(&self.value, &mut |object| {
            if let Some(reference) = object.get("$ref") {
                let pointer = reference.as_str().and_then(|text| text.strip_prefix('#'));
                let found = pointer.and_then(|pointer| self.value.pointer(pointer));
                assert!(found.is_some(), "{reference} leads nowhere");
            }
        });
    }

    /// The answer's status, content type and body are those that the operation describes.
    pub fn check_answer(&self, operation: &Operation, answer: &Answer) {
        let (id, status) = (&operation.id, answer.status);
        let responses = &operation.value["responses"];
        let response = match responses.get(status.to_string()) {
            Some(response) => response,
            None => {
                // What any route may answer is described once; the rest is the operation's.
                let is_any = status == 403 || status >= 500;
                assert!(is_any, "{id} answers {status}, which is not described: {}", answer.body);
                &responses["default"]
            }
        };
        self.check_response(&format!("{id}, {status}"), response, answer);
    }

    /// The answer is a problem.
    pub fn check_problem(&self, answer: &Answer) {
        self.check_response("a problem", &self.value["components"]["responses"]["Failure"], answer);
    }

    fn check_response(&self, what: &str, response: &Value, answer: &Answer) {
        let response = match response["$ref"].as_str() {
            Some(reference) => self.value.pointer(&reference[1..]).unwrap(),
            None => response,
        };
        let Some(content) = response.get("content") else {
            return assert!(
                answer.body.is_empty(),
                "{what}: no body is described, but it is {}",
                answer.body
            );
        };
        let media = content.get(&answer.content_type);
        let media = media.unwrap_or_else(|| panic!("{what}: {} is not described", answer.content_type));
        if let Some(schema) = media.get("schema") {
            let errors = self.errors(schema, &answer.value());
            assert!(errors.is_empty(), "{what}: {errors:#?}\n{}", answer.body);
        }
    }

    /// What a request sends is what the operation describes.
    pub fn check_request(&self, operation: &Operation, path: &str, body: &str) {
        let id = &operation.id;
        let parameters = operation.value["parameters"].as_array().into_iter().flatten();
        let known: Vec<&str> = parameters.filter_map(|parameter| parameter["name"].as_str()).collect();
        for pair in
            path.split_once('?').map_or("", |(_, query)| query).split('&').filter(|pair| !pair.is_empty())
        {
            let name = pair.split('=').next().unwrap_or_default();
            assert!(known.contains(&name), "{id} does not describe the parameter {name}");
        }
        if let Some(schema) = operation.value.pointer("/requestBody/content/application~1json/schema") {
            let body = serde_json::from_str(if body.is_empty() { "{}" } else { body }).unwrap();
            assert_eq!(self.errors(schema, &body), Vec::<String>::new(), "{id} describes another body");
        }
    }

    /// What is wrong with a value.
    pub fn errors(&self, schema: &Value, value: &Value) -> Vec<String> {
        let whole = json!({ "allOf": [schema], "components": self.strict });
        let options = jsonschema::draft202012::options();
        let validator = options.should_validate_formats(true).build(&whole).expect("a schema");
        let told = |error: jsonschema::ValidationError| {
            format!("at {:?}: {error}", error.instance_path().to_string())
        };
        validator.iter_errors(value).map(told).collect()
    }
}

impl Operation {
    /// The parameters of its path are described, and there are no others.
    pub fn check_parameters(&self) {
        let described = self.value["parameters"].as_array().into_iter().flatten();
        let mut in_path = BTreeSet::new();
        for parameter in described {
            assert!(
                parameter["description"].is_string(),
                "{} in {} is not described",
                parameter["name"],
                self.id
            );
            if parameter["in"] == "path" {
                assert_eq!(parameter["required"], true, "{} in {}", parameter["name"], self.id);
                in_path.insert(parameter["name"].as_str().unwrap().to_owned());
            }
        }
        let braced = self.template.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        assert_eq!(in_path, braced.map(str::to_owned).collect(), "{}", self.id);
    }

    /// The statuses that it describes one by one.
    pub fn statuses(&self) -> impl Iterator<Item = &str> {
        let responses = self.value["responses"].as_object().unwrap();
        responses.keys().map(String::as_str).filter(|status| *status != "default")
    }

    /// Its path, with nameless parameters.
    pub fn shape(&self) -> String {
        self.filled("{}")
    }

    /// A path that leads to it.
    pub fn example_path(&self) -> String {
        self.filled("1")
    }

    fn filled(&self, with: &str) -> String {
        let parts = self.template.split('/').map(|part| if part.starts_with('{') { with } else { part });
        parts.collect::<Vec<_>>().join("/")
    }

    /// Whether a path, apart from its query, is one of this operation.
    pub fn fits(&self, path: &str) -> bool {
        let (mut given, mut template) =
            (path.split('?').next().unwrap_or_default().split('/'), self.template.split('/'));
        template.all(|part| given.next().is_some_and(|given| part.starts_with('{') || part == given))
            && given.next().is_none()
    }
}

fn each(value: &Value, visit: &mut impl FnMut(&Map<String, Value>)) {
    match value {
        Value::Object(object) => {
            visit(object);
            object.values().for_each(|inner| each(inner, visit));
        }
        Value::Array(items) => items.iter().for_each(|inner| each(inner, visit)),
        _ => {}
    }
}

/// The schemas that are parts of others, which have more members.
fn find_parts(value: &Value, parts: &mut BTreeSet<String>) {
    each(value, &mut |object| {
        for part in object.get("allOf").and_then(Value::as_array).into_iter().flatten() {
            let name = part["$ref"].as_str().and_then(|reference| reference.rsplit('/').next());
            parts.extend(name.map(str::to_owned));
        }
    });
}

/// Forbids members that a schema does not describe, unless it allows them in so many words.
fn close(schema: &mut Value, is_part: bool) {
    match schema {
        Value::Object(object) => {
            let open = object.contains_key("additionalProperties");
            if !is_part && !open && (object.contains_key("properties") || object.contains_key("allOf")) {
                object.insert("unevaluatedProperties".to_owned(), json!(false));
            }
            for (keyword, inner) in object {
                close(inner, keyword == "allOf");
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|inner| close(inner, is_part)),
        _ => {}
    }
}
