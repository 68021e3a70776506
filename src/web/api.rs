//! The HTTP API under `/api/v1`, metrics and health. `api.md` is its description for users; change both together.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::body::Body;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Extension, Path, Query, State};
use axum::http::header::{self, HeaderMap, HeaderValue};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, middleware};
use bytes::Bytes;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};
use tracing::{Level, info, warn};

use super::error::ApiError;
use super::feed::{self, ListenError};
use super::guard::{self, Caller, Peer};
use super::live::{self, CommandError};
use super::log::{Line, level_from_name};
use super::ticker::Samples;
use super::values::Snapshot;
use super::views::{Component, ControlError, Sessions, Switch, Traffic, UpstreamView, overall};
use super::{App, pages};
use crate::hub::Face;
use crate::observe::{Health, Kind, Metrics, Status};

/// Bytes of a request's body; a command's value and a login are far smaller.
const MAX_BODY_BYTES: usize = 16 * 1024;
/// Sessions in one answer.
const MAX_SESSIONS: usize = 500;
/// Log lines in one answer.
const MAX_LINES: usize = 1000;
/// Bytes of a user's name or password.
const MAX_CREDENTIAL_BYTES: usize = 1024;

/// All routes behind the guard.
pub fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/status", get(get_status))
        .route("/values", get(get_values))
        .route("/clients", get(get_clients))
        .route("/clients/{face}/{client_id}/purge", post(post_purge))
        .route("/upstreams", get(get_upstreams))
        .route("/upstreams/{name}/{action}", post(post_upstream))
        .route("/devices/{device}/{point}", post(post_command))
        .route("/log", get(get_log))
        .route("/events", get(get_events))
        .route("/login", post(post_login))
        .route("/logout", post(post_logout));
    Router::new()
        .nest("/api/v1", api)
        .route("/metrics", get(get_metrics))
        .route("/healthz", get(get_health))
        .fallback(fallback)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard))
        .with_state(app)
}

/// The whole state of the gateway but its values.
#[derive(Serialize)]
pub struct StatusView {
    gateway: String,
    version: &'static str,
    boot_id: String,
    time: String,
    uptime_seconds: u64,
    clock_set: bool,
    health: &'static str,
    pub components: Vec<Component>,
    /// Messages per second, over the last five seconds.
    received_per_second: f64,
    sent_per_second: f64,
    /// Messages that were not delivered because of a limit, since the start.
    dropped: u64,
}

pub fn status(app: &App) -> StatusView {
    let (clock, statuses) = (app.clock(), statuses(app));
    let (received_per_second, sent_per_second) = app.samples.lock().rates();
    StatusView {
        gateway: app.parts.gateway.to_string(),
        version: env!("CARGO_PKG_VERSION"),
        boot_id: clock.boot_id().to_owned(),
        time: clock.now().to_string(),
        uptime_seconds: clock.uptime().as_secs(),
        clock_set: clock.is_set(),
        health: overall(&statuses).name(),
        components: statuses.into_iter().map(Component::from).collect(),
        received_per_second,
        sent_per_second,
        dropped: Traffic::of(&app.parts.hub).dropped,
    }
}

fn statuses(app: &App) -> Vec<Status> {
    app.parts.controls.components().iter().flat_map(|component| component.statuses()).collect()
}

/// The status for whoever asks: with whether a login is needed, and who is logged in.
async fn get_status(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> Response {
    #[derive(Serialize)]
    struct Answer {
        status: StatusView,
        user: Option<String>,
        pages: String,
    }
    fresh(&Answer { status: status(&app), user: caller.user.map(|user| user.to_string()), pages: pages::version() })
}

async fn get_values(State(app): State<Arc<App>>) -> Response {
    #[derive(Serialize)]
    struct Answer {
        time: String,
        values: Vec<Snapshot>,
        left_off: u64,
    }
    let (values, left_off) = app.values.snapshot();
    fresh(&Answer { time: app.clock().now().to_string(), values, left_off })
}

#[derive(Deserialize)]
struct ClientsQuery {
    #[serde(default)]
    search: String,
}

async fn get_clients(
    State(app): State<Arc<App>>,
    query: Result<Query<ClientsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Answer<'a> {
        #[serde(flatten)]
        sessions: Sessions,
        received_per_second: f64,
        sent_per_second: f64,
        dropped: u64,
        dropped_by_reason: BTreeMap<&'static str, u64>,
        /// Messages received and sent in each of the last seconds, oldest first.
        history: &'a [(u64, u64)],
    }
    let hint = "Give search=WORD, a part of a client id, user, address, face or topic filter; it may be left out.";
    let Query(query) = query.map_err(|rejection| ApiError::bad_request(rejection.body_text(), hint))?;
    let sessions = Sessions::search(&app.parts.hub, &query.search, MAX_SESSIONS);
    let counters = app.parts.hub.counters();
    let (dropped, dropped_by_reason) = (counters.dropped(), counters.dropped_by_reason().into());
    let mut samples = app.samples.lock();
    let (received_per_second, sent_per_second) = samples.rates();
    let Samples { traffic, .. } = &mut *samples;
    let history = &*traffic.make_contiguous();
    Ok(fresh(&Answer { sessions, received_per_second, sent_per_second, dropped, dropped_by_reason, history }))
}

/// The upstreams as `/upstreams` and the event of that name give them.
#[derive(Serialize)]
pub struct UpstreamsView {
    upstreams: Vec<UpstreamView>,
}

/// How much of each queue's history goes along.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum With {
    Latest,
    History,
}

pub fn upstreams(app: &App, with: With) -> UpstreamsView {
    let mut statuses: Vec<_> = statuses(app).into_iter().filter(|status| status.kind == Kind::Upstream).collect();
    let all = app.parts.controls.upstreams();
    let samples = app.samples.lock();
    let view = |upstream: super::Upstream| {
        let status = statuses.iter().position(|status| status.name == upstream.name).map(|at| statuses.remove(at));
        UpstreamView {
            paused: upstream.paused,
            state: upstream.state,
            connection: upstream.connection,
            status: status.map(Component::from),
            queue: upstream.depth,
            dropped: upstream.dropped,
            backlog: upstream.backlog,
            outlook: samples.uplinks.outlook(&upstream.name),
            history: if with == With::History { samples.uplinks.history(&upstream.name) } else { Vec::new() },
            name: upstream.name,
        }
    };
    UpstreamsView { upstreams: all.into_iter().map(view).collect() }
}

async fn get_upstreams(State(app): State<Arc<App>>) -> Response {
    fresh(&upstreams(&app, With::History))
}

async fn post_upstream(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path((name, action)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (to, done) = match action.as_str() {
        "pause" => (Switch::Cut, "cut"),
        "resume" => (Switch::Restore, "restored"),
        "connect" => (Switch::Connect, "asked to connect"),
        _ => return Err(nothing_here(&format!("/api/v1/upstreams/{name}/{action}"))),
    };
    app.parts.controls.switch_upstream(&name, to).map_err(|error| match error {
        ControlError::UnknownUpstream(_) => {
            ApiError::not_found(error.to_string(), "GET /api/v1/upstreams lists those that are configured.")
        }
        ControlError::Refused(_) => ApiError::new(
            StatusCode::CONFLICT,
            "refused",
            error.to_string(),
            "Look at the upstream's state on the overview page and try again.",
        ),
    })?;
    let by = caller.user.as_deref().unwrap_or("local");
    info!(upstream = name, by, "upstream {done}");
    Ok(StatusCode::NO_CONTENT)
}

/// Gives up what waits for a session.
async fn post_purge(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path((face, client_id)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let hub = &app.parts.hub;
    let purged = match Face::named(&face) {
        Some(face) => hub.purge(face, &client_id).await,
        None => None,
    };
    let Some(messages) = purged else {
        let hint = "GET /api/v1/clients lists the sessions there are, each with its face and client id.";
        return Err(ApiError::not_found(format!("there is no session of the {face} client `{client_id}`"), hint));
    };
    let by = caller.user.as_deref().unwrap_or("local");
    warn!(face, client_id, messages, by, "messages that waited were purged");
    Ok(fresh(&json!({ "messages": messages })))
}

#[derive(Deserialize)]
struct Command {
    value: Json,
}

async fn post_command(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path((device, point)): Path<(String, String)>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let Command { value } = parse(body, r#"Send {"value":21.5}; a value is a number, a boolean or a text."#)?;
    let by = caller.user.as_deref().unwrap_or("local");
    info!(device, point, %value, by, "point set by hand");
    let value = live::command(&app, &device, &point, &value).await.map_err(|error| {
        let (status, code, hint) = match &error {
            CommandError::Name(_) => {
                (StatusCode::BAD_REQUEST, "bad_request", "Names are one level of a topic, without /, + and #.")
            }
            CommandError::NobodyListens => {
                let hint = "Check the device's name, and that its adapter runs; GET /api/v1/status lists both.";
                (StatusCode::NOT_FOUND, "not_found", hint)
            }
            CommandError::NoAnswer => {
                let hint = "Check on the devices page whether it is well; the value may have been set all the same.";
                (StatusCode::GATEWAY_TIMEOUT, "no_answer", hint)
            }
            CommandError::Refused(_) => {
                (StatusCode::CONFLICT, "refused", "The device or its adapter refused the value; nothing was set.")
            }
            CommandError::Attach(_) | CommandError::Subscribe(_) => {
                (StatusCode::SERVICE_UNAVAILABLE, "busy", "Try again in a moment; see the limits in the configuration.")
            }
        };
        ApiError::new(status, code, error.to_string(), hint)
    })?;
    Ok(fresh(&json!({ "value": value })))
}

#[derive(Deserialize)]
struct LogQuery {
    #[serde(default)]
    after: u64,
    level: Option<String>,
    limit: Option<usize>,
}

async fn get_log(
    State(app): State<Arc<App>>,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    #[derive(Serialize)]
    struct Answer<'a> {
        lines: Vec<&'a Line>,
        /// What to give as `after` next time.
        last: u64,
    }
    let hint = "Give after=SEQUENCE, level=error|warn|info|debug and limit=1…1000; all may be left out.";
    let Query(query) = query.map_err(|rejection| ApiError::bad_request(rejection.body_text(), hint))?;
    let level = match query.level.as_deref() {
        None => Level::DEBUG,
        Some(name) => level_from_name(name)
            .ok_or_else(|| ApiError::bad_request(format!("`{name}` is no log level of this page"), hint))?,
    };
    // Asked first: a line that is written in between comes again rather than never.
    let last = app.parts.log.last();
    let lines = app.parts.log.after(query.after, level, query.limit.unwrap_or(MAX_LINES).min(MAX_LINES));
    Ok(fresh(&Answer { lines: lines.iter().map(|line| &**line).collect(), last }))
}

async fn get_events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let last_seen = headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let hello = |resumed: bool| {
        let clock = app.clock();
        let data = json!({ "resumed": resumed, "boot_id": clock.boot_id(), "pages": pages::version() });
        feed::encode(None, "hello", &data.to_string())
    };
    let body = app.feed.listen(last_seen, caller.token, hello).map_err(|error| match error {
        ListenError::Full => ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_live_views",
            format!("{} live views are open already", feed::MAX_LISTENERS),
            "Close pages of the gateway that nobody looks at.",
        )
        .retry_after(10),
        ListenError::Closed => ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "the gateway is stopping",
            "Wait until it is back.",
        )
        .retry_after(5),
    })?;
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, Body::new(body)).into_response())
}

#[derive(Deserialize)]
struct Login {
    user: String,
    password: String,
}

async fn post_login(
    State(app): State<Arc<App>>,
    Extension(Peer(peer)): Extension<Peer>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let Login { user, password } = parse(body, r#"Send {"user":"…","password":"…"}."#)?;
    if user.len() > MAX_CREDENTIAL_BYTES || password.len() > MAX_CREDENTIAL_BYTES {
        return Err(wrong_password());
    }
    may_guess(&app, peer)?;
    let Ok(permit) = app.password_checks.acquire().await else { return Err(wrong_password()) };
    // Others of the same address may have guessed wrong meanwhile.
    may_guess(&app, peer)?;
    let right = check_password(&app, &user, password).await;
    if !right {
        app.guesses.failed(Some(peer.ip()), Instant::now());
        app.counters.failed_logins.fetch_add(1, Ordering::Relaxed);
        warn!(%peer, "wrong user or password for the web UI");
        return Err(wrong_password());
    }
    drop(permit);
    app.guesses.succeeded(Some(peer.ip()));
    let token = app.logins.start(&user, Instant::now()).map_err(|error| {
        let hint = "The system gives no random numbers; this should never happen.";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "no_random", error.to_string(), hint)
    })?;
    info!(%peer, user, "logged in to the web UI");
    Ok((StatusCode::NO_CONTENT, [(header::SET_COOKIE, guard::login_cookie(&token, app.has_tls))]).into_response())
}

/// Refuses, without a look at the password, while the address has to wait.
fn may_guess(app: &App, peer: SocketAddr) -> Result<(), ApiError> {
    let Some(delay) = app.guesses.delay(Some(peer.ip()), Instant::now()) else { return Ok(()) };
    let seconds = delay.as_secs() + 1;
    let message = format!("too many wrong passwords; wait {seconds} s");
    let hint = "If you forgot it, set a new one with `fieldgate passwd` on the gateway.";
    let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_attempts", message, hint);
    Err(error.retry_after(seconds))
}

async fn check_password(app: &App, user: &str, password: String) -> bool {
    let (access, user) = (app.parts.hub.access(), user.to_owned());
    let check = move || access.authenticate(Some(&user), Some(password.as_bytes()), false).is_ok();
    tokio::task::spawn_blocking(check).await.unwrap_or(false)
}

/// Says not which of the two was wrong.
fn wrong_password() -> ApiError {
    ApiError::new(
        StatusCode::UNAUTHORIZED,
        "wrong_password",
        "user or password is wrong",
        "Users are listed under `users` in the configuration; set a password with `fieldgate passwd`.",
    )
}

async fn post_logout(State(app): State<Arc<App>>, Extension(caller): Extension<Caller>) -> Response {
    if let Some(token) = &caller.token {
        app.logins.end(token);
        app.feed.keep(|login| login != token);
    }
    (StatusCode::NO_CONTENT, [(header::SET_COOKIE, guard::logout_cookie())]).into_response()
}

async fn get_metrics(State(app): State<Arc<App>>) -> Response {
    let mut metrics = Metrics::default();
    let (clock, controls) = (app.clock(), &app.parts.controls);
    let labels = [("version", env!("CARGO_PKG_VERSION"))];
    metrics.gauge("fieldgate_build_info", "Always 1; the labels tell the release.", &labels, 1.0);
    metrics.gauge("fieldgate_uptime_seconds", "Time since the start.", &[], clock.uptime().as_secs_f64());
    let is_set = f64::from(u8::from(clock.is_set()));
    metrics.gauge("fieldgate_clock_set", "Whether wall time has been set.", &[], is_set);
    for component in controls.components() {
        for Status { kind, name, health, .. } in component.statuses() {
            let labels = [("kind", kind.name()), ("name", name.as_str())];
            let is_up = f64::from(u8::from(health == Health::Good));
            metrics.gauge("fieldgate_component_good", "1 while a component is well.", &labels, is_up);
        }
        component.collect(&mut metrics);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], metrics.render()).into_response()
}

/// 200 while the gateway does its work, also when some device is down; 503 otherwise. For watchdogs and balancers.
async fn get_health(State(app): State<Arc<App>>) -> Response {
    let health = overall(&statuses(&app));
    let status = if health == Health::Down { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (status, format!("{}\n", health.name())).into_response()
}

async fn fallback(method: Method, uri: Uri, headers: HeaderMap) -> Response {
    if uri.path().starts_with("/api/") {
        nothing_here(uri.path()).into_response()
    } else if matches!(method, Method::GET | Method::HEAD) {
        pages::page(uri, headers).await
    } else {
        method_not_allowed().await.into_response()
    }
}

async fn method_not_allowed() -> ApiError {
    let message = "this address does not take this method";
    let hint = "State is read with GET and changed with POST; see src/web/api.md.";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message, hint)
}

fn nothing_here(path: &str) -> ApiError {
    ApiError::not_found(format!("the API has nothing at {path}"), "The API is described in src/web/api.md.")
}

/// A JSON body, whatever its content type says.
fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, hint: &'static str) -> Result<T, ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            let message = format!("the body has more than {MAX_BODY_BYTES} bytes");
            ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message, hint)
        }
        _ => ApiError::bad_request("the body did not arrive in full", hint),
    })?;
    serde_json::from_slice(&body)
        .map_err(|error| ApiError::bad_request(format!("the body is no such JSON: {error}"), hint))
}

/// JSON that nobody may keep.
fn fresh(answer: &impl Serialize) -> Response {
    let mut response = axum::Json(answer).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
