//! Who may ask: the checks before every request, and the headers of every answer.
//!
//! - A request from this machine to a loopback address needs no login. It must name a loopback host, so that a web page
//!   cannot reach in by pointing its own host name at 127.0.0.1 (DNS rebinding), and must not come through a proxy.
//! - Everything else but the pages themselves and the login needs a login, by the session cookie.
//! - `/metrics` and `/healthz` are also open to programs on this machine when the UI listens elsewhere, and `/metrics` to
//!   whoever shows the token for it.
//! - What changes something must come from our own pages: the cookie is `SameSite=Strict` and the origin is checked.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::logins::Token;
use crate::secret::Secret;

/// The name of the session cookie.
const COOKIE: &str = "fieldgate_session";
/// The longest a request may take until its answer begins; a command to a slow device takes longest.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Scripts and styles only from here and never inline; nothing may frame the pages.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
     connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

const HEADERS: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The other end of the connection that a request came on.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Who asks.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// The user that is logged in.
    pub user: Option<Arc<str>>,
    pub token: Option<Token>,
    /// May ask without a login.
    pub is_local: bool,
}

/// Checks a request, answers it or lets it through, and puts the security headers on the answer.
pub async fn guard(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    app.counters.requests.fetch_add(1, Ordering::Relaxed);
    let mut response = match check(&app, &request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
                Ok(response) => response,
                Err(_) => timed_out().into_response(),
            }
        }
        Err(error) => error.into_response(),
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The value of `Set-Cookie` that logs a browser in.
pub fn login_cookie(token: &str, secure: bool) -> String {
    let secure = if secure { "; Secure" } else { "" };
    format!("{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict{secure}")
}

/// The value of `Set-Cookie` that logs a browser out.
pub fn logout_cookie() -> String {
    format!("{COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0")
}

fn check(app: &App, request: &Request) -> Result<Caller, ApiError> {
    let headers = request.headers();
    let host = host(request).ok_or_else(|| {
        ApiError::bad_request("the request names no host", "Send a Host header, as every HTTP/1.1 client does.")
    })?;
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        check_origin(headers, host)?;
    }
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip().to_canonical());
    // A proxy on this machine speaks for somebody else.
    let from_here = peer.is_some_and(|peer| peer.is_loopback()) && !is_forwarded(headers);
    let listens_here = app.address.ip().to_canonical().is_loopback();
    let names_here = is_loopback_host(host);
    if listens_here && from_here && !names_here {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "host_not_allowed",
            "this address answers only under a loopback name",
            "Open the page as localhost or 127.0.0.1, or set `web: { address: … }` to serve other machines.",
        ));
    }
    let token = cookie(headers);
    let login = token.and_then(|token| Some((app.logins.user(token, Instant::now())?, token)));
    let caller = Caller {
        user: login.as_ref().map(|(user, _)| user.clone()),
        token: login.map(|(_, token)| token.into()),
        is_local: listens_here && from_here,
    };
    let path = request.uri().path();
    let shows_token = path == "/metrics" && app.metrics_token.as_ref().is_some_and(|token| is_shown(token, headers));
    let is_open = is_public(path) || (from_here && names_here && is_for_programs(path)) || shows_token;
    if caller.is_local || caller.user.is_some() || is_open {
        return Ok(caller);
    }
    Err(ApiError::new(
        StatusCode::UNAUTHORIZED,
        "login_required",
        "log in to see this",
        "Open the page in a browser and log in as a user of the gateway, or POST to /api/v1/login and keep the cookie.",
    ))
}

/// The pages hold nothing secret: they ask for a login when the API does.
fn is_public(path: &str) -> bool {
    !is_for_programs(path) && (!path.starts_with("/api/") || path == "/api/v1/login")
}

fn is_for_programs(path: &str) -> bool {
    path == "/metrics" || path == "/healthz"
}

/// Whether the request has `Authorization: Bearer` with this token (RFC 6750 §2.1). All bytes are looked at, so that the
/// time tells nothing about how many are right.
fn is_shown(token: &Secret, headers: &HeaderMap) -> bool {
    let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let Some((scheme, shown)) = value.split_once(' ') else { return false };
    let (shown, token) = (shown.trim().as_bytes(), token.reveal().as_bytes());
    let differing = shown.iter().zip(token).fold(0, |bits, (a, b)| bits | (a ^ b));
    scheme.eq_ignore_ascii_case("bearer") && shown.len() == token.len() && differing == 0
}

/// A browser tells where a request that changes something came from; other programs need not.
fn check_origin(headers: &HeaderMap, host: &str) -> Result<(), ApiError> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let is_ours = match (headers.get(header::ORIGIN), text(HeaderName::from_static("sec-fetch-site"))) {
        (Some(origin), _) => {
            let origin = origin.to_str().unwrap_or_default();
            let origin = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://")).unwrap_or_default();
            // A web page can make a browser send no X-Forwarded-Host to us without our consent.
            let forwarded = text(HeaderName::from_static("x-forwarded-host"));
            !origin.is_empty()
                && (origin.eq_ignore_ascii_case(host)
                    || forwarded.is_some_and(|forwarded| origin.eq_ignore_ascii_case(forwarded)))
        }
        (None, Some(site)) => site == "same-origin" || site == "none",
        (None, None) => true,
    };
    if is_ours {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::FORBIDDEN,
        "foreign_origin",
        "the request comes from another site's page",
        "Use the gateway's own pages, or a program that sends no Origin header.",
    ))
}

/// Host and port as the request names them.
fn host(request: &Request) -> Option<&str> {
    let authority = request.uri().authority().map(axum::http::uri::Authority::as_str);
    authority.or_else(|| request.headers().get(header::HOST)?.to_str().ok()).filter(|host| !host.is_empty())
}

fn is_loopback_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

fn is_forwarded(headers: &HeaderMap) -> bool {
    ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via"]
        .iter()
        .any(|name| headers.contains_key(*name))
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, _)| *name == COOKIE).map(|(_, value)| value)
}

fn timed_out() -> ApiError {
    ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "timeout",
        "the request took too long",
        "Try again; if it goes on, look at the log page for a component that hangs.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_hosts_are_told_from_names_that_only_look_so() {
        let check = |host: &str, expected: bool| assert_eq!(is_loopback_host(host), expected, "{host}");
        check("localhost", true);
        check("LOCALHOST:8080", true);
        check("localhost.", true);
        check("ui.localhost:80", true);
        check("127.0.0.1:8080", true);
        check("127.1.2.3", true);
        check("[::1]:8080", true);
        check("[::ffff:127.0.0.1]", true);
        check("localhost.evil.example", false);
        check("127.0.0.1.evil.example:8080", false);
        check("evil.example", false);
        check("192.168.1.2:8080", false);
        check("", false);
        check("[", false);
    }

    #[test]
    fn origins_of_other_sites_may_change_nothing() {
        let check = |given: &[(&'static str, &str)], allowed: bool| {
            let pairs = given
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()));
            assert_eq!(check_origin(&pairs.collect(), "gate:8080").is_ok(), allowed, "{given:?}");
        };
        check(&[], true);
        check(&[("origin", "http://gate:8080")], true);
        check(&[("origin", "https://GATE:8080")], true);
        check(&[("origin", "http://gate")], false);
        check(&[("origin", "http://evil.example")], false);
        check(&[("origin", "null")], false);
        check(&[("origin", "")], false);
        check(&[("origin", "https://plant.example"), ("x-forwarded-host", "plant.example")], true);
        check(&[("sec-fetch-site", "cross-site")], false);
        check(&[("sec-fetch-site", "same-site")], false);
        check(&[("sec-fetch-site", "same-origin")], true);
    }

    #[test]
    fn the_cookie_is_found_among_others() {
        let check = |value: &'static str, expected: Option<&str>| {
            let headers: HeaderMap = [(header::COOKIE, HeaderValue::from_static(value))].into_iter().collect();
            assert_eq!(cookie(&headers), expected, "{value}");
        };
        check("fieldgate_session=abc", Some("abc"));
        check("a=b; fieldgate_session=abc; c=d", Some("abc"));
        check("xfieldgate_session=abc", None);
        check("", None);
    }
}
