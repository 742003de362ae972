//! `GET /v1/models` and `GET /v1/models/{id}`. One object carries OpenAI's, vLLM's and Anthropic's keys: extra keys are safe.

use serde_json::{Value, json};

use crate::api::{Service, clock};
use crate::error::Failure;

pub fn list(service: &Service) -> Value {
    let names = service.names();
    json!({
        "object": "list",
        "data": names.iter().map(|name| card(service, name)).collect::<Vec<_>>(),
        "has_more": false,
        "first_id": names.first(),
        "last_id": names.last(),
    })
}

/// `id`: any name that requests may use.
pub fn retrieve(service: &Service, id: &str) -> Result<Value, Failure> {
    service.check_model_name(id)?;
    let listed = service.names().iter().any(|name| name == id);
    Ok(card(service, if listed { id } else { service.name() }))
}

fn card(service: &Service, name: &str) -> Value {
    let created = service.model.created;
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "worker-candle",
        "root": service.model.public_name(),
        "parent": null,
        "max_model_len": service.engine.limits().max_model_len,
        "quantization": service.model.quantization,
        "weights": service.model.weights,
        "permission": [{
            "id": format!("modelperm-{:016x}", fingerprint(name)),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": !service.settings.refuse_logprobs,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
        "type": "model",
        "display_name": name,
        "created_at": clock::rfc3339(created),
    })
}

/// FNV-1a: the same id for the same name, always.
fn fingerprint(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
