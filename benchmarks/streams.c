/* Opens many streams of server-sent events at one address and measures how late events come.
 *
 *   streams PORT PATH STREAMS SECONDS PATIENCE
 *
 * An event counts when one of its "data:" lines holds "t_us": and a number, the microsecond (CLOCK_REALTIME) at which it
 * was due. Prints {"open": STREAMS} once all have been answered 200. Then it reads from standard input, in a line of its
 * own, how many events each stream is to get; it ends when all have got them, PATIENCE seconds after it has read that
 * number, when standard input ends without one, or after SECONDS; and prints as a line of JSON:
 *
 *   delivered   events, of each stream so many as it is to get at most
 *   extra       events above that
 *   fewest      events of the stream that got the fewest
 *   closed      streams that the server has ended
 *   p50_ms, p99_ms, max_ms   how late, over all events of all streams
 *
 * Ends with 1 where a stream is not answered 200, with 3 where too few files may be open. Loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define KEPT 1024          /* so much of a line is kept; what is looked for stands before that */
#define BUCKET_US 20
#define BUCKETS 1500000    /* up to 30 s */
#define OPENING 64         /* streams that wait for their answer at one time */
#define OTHER_FILES 32
#define AT_ONCE 512

enum place { HEAD, SIZE, CHUNK, PLAIN };

/* A line, as far as it has come. */
struct line {
  size_t length;
  char text[KEPT];
};

struct stream {
  int fd;
  enum place place;
  int is_200, is_chunked;
  uint64_t left;           /* of a chunk */
  uint64_t events;
  struct line frame;       /* of HTTP itself */
  struct line content;     /* which a chunk may cut anywhere */
};

static struct stream *streams;
static int wanted, answered, closed;
static uint32_t lateness[BUCKETS];
static uint64_t events, latest_us;

static uint64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void fail(const char *what) {
  fprintf(stderr, "streams: %s\n", what);
  exit(1);
}

static void on_content(struct stream *s, const char *line, size_t length) {
  static const char mark[] = "\"t_us\":";
  if (length < 5 || memcmp(line, "data:", 5)) return;
  const char *end = line + length, *at = memmem(line, length, mark, sizeof mark - 1);
  if (!at) return;
  uint64_t due = 0, now = now_us();
  for (at += sizeof mark - 1; at < end && *at == ' '; at++) {}
  for (; at < end && *at >= '0' && *at <= '9'; at++) due = due * 10 + (uint64_t)(*at - '0');
  uint64_t late = now > due ? now - due : 0, bucket = late / BUCKET_US;
  lateness[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
  if (late > latest_us) latest_us = late;
  events++;
  s->events++;
}

static void on_frame(struct stream *s, const char *line, size_t length) {
  if (length && line[length - 1] == '\r') length--;
  if (s->place == SIZE) {
    char digits[20] = {0};
    memcpy(digits, line, length < sizeof digits - 1 ? length : sizeof digits - 1);
    /* An empty line ends the chunk before it. */
    if (length && (s->left = strtoull(digits, 0, 16))) s->place = CHUNK;
  } else if (length == 0) {
    if (!s->is_200) fail("a stream was not answered 200");
    answered++;
    s->place = s->is_chunked ? SIZE : PLAIN;
  } else if (length >= 12 && !memcmp(line, "HTTP/1.1 200", 12)) {
    s->is_200 = 1;
  } else if (length > 18 && !strncasecmp(line, "transfer-encoding:", 18) && memmem(line, length, "chunked", 7)) {
    s->is_chunked = 1;
  }
}

/* Takes one line, or the part of it that is there; returns how much that was. */
static size_t take(struct stream *s, struct line *kept, const char *data, size_t size,
                   void (*on_line)(struct stream *, const char *, size_t)) {
  const char *end = memchr(data, '\n', size);
  size_t part = end ? (size_t)(end - data) : size;
  if (end && !kept->length) {
    on_line(s, data, part);
    return part + 1;
  }
  size_t room = KEPT - kept->length, more = part < room ? part : room;
  memcpy(kept->text + kept->length, data, more);
  kept->length += more;
  if (!end) return size;
  on_line(s, kept->text, kept->length);
  kept->length = 0;
  return part + 1;
}

static void on_data(struct stream *s, const char *data, size_t size) {
  while (size) {
    size_t used;
    if (s->place == HEAD || s->place == SIZE) {
      used = take(s, &s->frame, data, size, on_frame);
    } else {
      size_t part = s->place == CHUNK && s->left < size ? (size_t)s->left : size;
      used = take(s, &s->content, data, part, on_content);
      if (s->place == CHUNK && !(s->left -= used)) s->place = SIZE;
    }
    data += used;
    size -= used;
  }
}

static void open_stream(struct stream *s, int poll, const struct sockaddr_in *address, const char *path) {
  char request[2048];
  int length = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n\r\n",
                        path, ntohs(address->sin_port));
  if ((s->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) fail("no socket");
  if (connect(s->fd, (const struct sockaddr *)address, sizeof *address)) fail("cannot connect");
  if (write(s->fd, request, (size_t)length) != length) fail("cannot ask");
  fcntl(s->fd, F_SETFL, O_NONBLOCK);
  struct epoll_event interest = {.events = EPOLLIN, .data.ptr = s};
  if (epoll_ctl(poll, EPOLL_CTL_ADD, s->fd, &interest)) fail("cannot wait for a stream");
}

static void read_stream(struct stream *s) {
  static char data[65536];
  ssize_t size = read(s->fd, data, sizeof data);
  if (size > 0) {
    on_data(s, data, (size_t)size);
  } else if (size == 0 || (errno != EAGAIN && errno != EINTR)) {
    close(s->fd);
    closed++;
    if (s->place == HEAD) fail("a stream was closed before it was answered");
  }
}

/* How many events each stream is to get; -1 where standard input has ended. */
static long read_number(void) {
  char text[32] = {0};
  return read(0, text, sizeof text - 1) > 0 ? atol(text) : -1;
}

static double percentile(double share) {
  uint64_t before = (uint64_t)(share * (double)events), seen = 0;
  for (int i = 0; i < BUCKETS; i++)
    if ((seen += lateness[i]) > before) return (i + 0.5) * BUCKET_US / 1000.0;
  return (double)latest_us / 1000.0;
}

static int all_have(uint64_t each) {
  for (int i = 0; i < wanted; i++)
    if (streams[i].events < each) return 0;
  return 1;
}

static void print_result(uint64_t each) {
  uint64_t delivered = 0, extra = 0, fewest = wanted ? streams[0].events : 0;
  for (int i = 0; i < wanted; i++) {
    uint64_t got = streams[i].events;
    delivered += got < each ? got : each;
    extra += got > each ? got - each : 0;
    if (got < fewest) fewest = got;
  }
  printf("{\"delivered\": %llu, \"extra\": %llu, \"fewest\": %llu, \"closed\": %d, \"p50_ms\": %.2f, \"p99_ms\": %.2f, "
         "\"max_ms\": %.2f}\n", (unsigned long long)delivered, (unsigned long long)extra, (unsigned long long)fewest, closed,
         percentile(0.5), percentile(0.99), (double)latest_us / 1000.0);
}

static void allow_files(int count) {
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  if (files.rlim_max < (rlim_t)count) {
    fprintf(stderr, "streams: %d files would have to be open, %llu may be\n", count, (unsigned long long)files.rlim_max);
    exit(3);
  }
  if (files.rlim_cur < (rlim_t)count) files.rlim_cur = (rlim_t)count;
  setrlimit(RLIMIT_NOFILE, &files);
}

int main(int count, char **arguments) {
  if (count != 6) fail("usage: streams PORT PATH STREAMS SECONDS PATIENCE");
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(arguments[1]))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  wanted = atoi(arguments[3]);
  allow_files(wanted + OTHER_FILES);
  streams = calloc((size_t)wanted, sizeof *streams);
  int poll = epoll_create1(0), opened = 0, said = 0;
  struct epoll_event input = {.events = EPOLLIN, .data.ptr = 0}, ready[AT_ONCE];
  epoll_ctl(poll, EPOLL_CTL_ADD, 0, &input);
  uint64_t end = now_us() + (uint64_t)(atof(arguments[4]) * 1e6), looked_at = 0;
  uint64_t patience = (uint64_t)(atof(arguments[5]) * 1e6);
  long each = 0;
  for (uint64_t now = now_us(); now < end && each >= 0; now = now_us()) {
    while (opened < wanted && opened - answered < OPENING) open_stream(&streams[opened++], poll, &address, arguments[2]);
    int some = epoll_wait(poll, ready, AT_ONCE, 20);
    for (int i = 0; i < some; i++) {
      if (ready[i].data.ptr) {
        read_stream(ready[i].data.ptr);
      } else if ((each = read_number()) > 0) {
        end = now + patience < end ? now + patience : end;
        epoll_ctl(poll, EPOLL_CTL_DEL, 0, 0);
      }
    }
    if (answered == wanted && !said) {
      said = 1;
      printf("{\"open\": %d}\n", wanted);
      fflush(stdout);
    }
    if (each > 0 && now - looked_at > 20000) {
      looked_at = now;
      if (all_have((uint64_t)each)) break;
    }
  }
  if (!said) fail("not all streams were answered in time");
  print_result(each > 0 ? (uint64_t)each : 0);
  return 0;
}
