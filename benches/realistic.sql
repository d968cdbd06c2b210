-- A shop's database, about 1 GiB for each million of :rows: text that repeats as real text does, numbers and times
-- that grow, JSON with the same keys in every row, random identifiers that no compressor can shorten, indexes.
-- pgbench's tables are mostly blanks and would flatter any compression.
SELECT setseed(0.42);
SET synchronous_commit = off;

CREATE FUNCTION pick(choices text[]) RETURNS text LANGUAGE sql VOLATILE AS
    $$ SELECT choices[1 + floor(random() * cardinality(choices))::int] $$;

CREATE TABLE customers AS
SELECT id,
       pick('{Anna,Boris,Chloe,David,Elif,Farid,Grace,Hugo,Ines,Jonas,Kaya,Liam,Maria,Noor,Olga,Pedro}') || ' '
           || pick('{Smith,Müller,García,Rossi,Nowak,Yilmaz,Ivanov,Martin,Silva,Kim,Haddad,Larsen}') AS name,
       'user' || id || '@' || pick('{example.com,mail.example.org,post.example.net}') AS email,
       (random() * 300)::int || ' ' || pick('{Main Street,High Street,Station Road,Park Lane,Mill Road,Church Street}')
           || ', ' || pick('{Springfield,Riverside,Fairview,Georgetown,Salem,Madison}') AS address,
       timestamptz '2020-01-01' + id * interval '57 seconds' AS created_at,
       (random() * 10000)::numeric(12, 2) AS balance
FROM generate_series(1, :rows / 2) AS id;

CREATE TABLE orders AS
SELECT id,
       1 + (random() * :rows / 2)::bigint AS customer,
       timestamptz '2021-01-01' + id * interval '31 seconds' AS placed_at,
       pick('{new,paid,packed,shipped,shipped,shipped,delivered,delivered,delivered,returned}') AS status,
       (random() * 500)::numeric(10, 2) AS total,
       jsonb_build_array(
           jsonb_build_object('article', (random() * 20000)::int, 'quantity', 1 + (random() * 4)::int, 'price', (random() * 100)::numeric(8, 2)),
           jsonb_build_object('article', (random() * 20000)::int, 'quantity', 1, 'price', (random() * 100)::numeric(8, 2))) AS lines
FROM generate_series(1, :rows) AS id;

CREATE TABLE events AS
SELECT timestamptz '2023-01-01' + id * interval '3 seconds' AS at,
       gen_random_uuid() AS session,
       pick('{view,view,view,view,search,add_to_cart,checkout,login,logout}') AS kind,
       '/' || pick('{shop,shop,help,account,blog}') || '/' || pick('{shoes,coats,lamps,books,tools,plants}') || '/' || (random() * 20000)::int AS path,
       pick('{"Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0","Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36","Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X)"}') AS agent,
       ('10.' || (random() * 255)::int || '.' || (random() * 255)::int || '.' || (random() * 255)::int)::inet AS address,
       jsonb_build_object('duration', (random() * 5000)::int, 'referrer', pick('{search,mail,direct,partner}'), 'experiment', (random() * 8)::int) AS detail
FROM generate_series(1, :rows * 3 / 2) AS id;

CREATE TABLE measurements AS
SELECT 1 + id % 400 AS sensor,
       timestamptz '2024-01-01' + id / 400 * interval '10 seconds' AS at,
       20 + 5 * sin(id / 40000.0) + random() AS value
FROM generate_series(1, :rows * 3) AS id;

ALTER TABLE customers ADD PRIMARY KEY (id);
ALTER TABLE orders ADD PRIMARY KEY (id);
CREATE INDEX ON orders (customer);
CREATE INDEX ON events (at);
CREATE INDEX ON events (session);
CREATE INDEX ON measurements (sensor, at);
VACUUM (FREEZE, ANALYZE);
CHECKPOINT;
