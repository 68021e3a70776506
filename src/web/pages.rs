//! The pages: a handful of files in the binary, served with a tag so that a browser loads each only once.

use std::hash::{DefaultHasher, Hash, Hasher};

use axum::http::header::{self, HeaderMap, HeaderValue};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

struct Asset {
    path: &'static str,
    content_type: &'static str,
    content: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

macro_rules! assets {
    ($($path:literal $file:literal $content_type:ident)*) => {
        &[$(Asset {
            path: $path,
            content_type: $content_type,
            content: include_str!(concat!("assets/", $file)),
        }),*]
    };
}

const ASSETS: &[Asset] = assets![
    "/" "index.html" HTML
    "/assets/style.css" "style.css" CSS
    "/assets/app.js" "app.js" JS
    "/assets/store.js" "store.js" JS
    "/assets/dom.js" "dom.js" JS
    "/assets/charts.js" "charts.js" JS
    "/assets/overview.js" "overview.js" JS
    "/assets/devices.js" "devices.js" JS
    "/assets/broker.js" "broker.js" JS
    "/assets/log.js" "log.js" JS
    "/assets/login.js" "login.js" JS
    "/assets/icon.svg" "icon.svg" SVG
];

/// Answers with the file at the path, or that there is none.
pub async fn page(uri: Uri, headers: HeaderMap) -> Response {
    let Some(asset) = ASSETS.iter().find(|asset| asset.path == uri.path()) else {
        let hint = "The pages start at /, the API at /api/v1/status; the API is described in src/web/api.md.";
        return ApiError::not_found(format!("there is nothing at {}", uri.path()), hint).into_response();
    };
    let tag = tag(&[asset]);
    let is_known = headers.get_all(header::IF_NONE_MATCH).iter().any(|given| given.as_bytes() == tag.as_bytes());
    let mut response = if is_known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, asset.content_type)], asset.content).into_response()
    };
    // "no-cache" means: ask each time whether it is still the same. A new release shows at once.
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// Changes when any page does; an open page reloads itself when it meets another one.
pub fn version() -> String {
    tag(&ASSETS.iter().collect::<Vec<_>>()).trim_matches('"').to_owned()
}

fn tag(assets: &[&Asset]) -> String {
    let mut hasher = DefaultHasher::new();
    assets.iter().for_each(|asset| asset.content.hash(&mut hasher));
    format!("\"{:016x}\"", hasher.finish())
}
