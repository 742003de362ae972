//! `GET /v1/models` and `GET /v1/models/{id}`. One object carries OpenAI's, vLLM's and Anthropic's keys: extra keys are safe.

use serde_json::{Value, json};

use crate::api::clock;
use crate::api::models::Models;
use crate::api::served::ServedModel;
use crate::config::ClientKey;
use crate::error::Failure;

/// Those that a client may use.
pub fn list(models: &Models, client: Option<&ClientKey>) -> Value {
    let all = models.iter().flat_map(|model| model.served.names().iter().map(|name| (&*model.served, name)));
    let allowed: Vec<_> = all.filter(|(_, name)| client.is_none_or(|client| client.may_use(name))).collect();
    json!({
        "object": "list",
        "data": allowed.iter().map(|(served, name)| card(served, name)).collect::<Vec<_>>(),
        "has_more": false,
        "first_id": allowed.first().map(|(_, name)| name),
        "last_id": allowed.last().map(|(_, name)| name),
    })
}

/// `id`: any name that requests may use.
pub fn retrieve(models: &Models, id: &str) -> Result<Value, Failure> {
    let served = &models.named(id).unwrap_or(&models.first).served;
    served.check_model_name(id)?;
    let listed = served.names().iter().any(|name| name == id);
    Ok(card(served, if listed { id } else { served.name() }))
}

fn card(served: &ServedModel, name: &str) -> Value {
    let created = served.model.created;
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "worker-candle",
        "root": served.model.public_name(),
        "parent": null,
        "max_model_len": served.limits.max_model_len,
        "quantization": served.model.quantization,
        "weights": served.model.weights,
        "permission": [{
            "id": format!("modelperm-{:016x}", fingerprint(name)),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": !served.settings.refuse_logprobs,
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
